"""Which targets become the model's own answers, and what a wrong helper gets."""

import warnings

import numpy as np
import pytest

from jaxsparse.contrib import self_distilled

PROMPTS = [f"{i}+{i}" for i in range(7)]
TARGETS = [str(2 * i) for i in range(7)]


def last_number(text):
    return text.rstrip(".").split()[-1]


def answer(prompt, target):
    """Wrong for every third."""
    i = int(prompt[0])
    return f"The sum is {2 * i + (i % 3 == 0)}."


def right(answer, target):
    return last_number(answer) == target


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_right_answers_replace_targets_in_order(batch_size):
    sizes = []

    def generate(prompts, targets):
        sizes.append(len(prompts))
        assert list(targets) == [TARGETS[PROMPTS.index(p)] for p in prompts]
        return [answer(*pair) for pair in zip(prompts, targets, strict=True)]

    found = self_distilled(
        PROMPTS, TARGETS, generate=generate, check=right, batch_size=batch_size
    )
    assert sum(sizes) == 7
    assert max(sizes) == min(batch_size, 7)
    assert found.replaced.tolist() == [i % 3 != 0 for i in range(7)]
    for i, (prompt, target) in enumerate(found.examples):
        assert prompt == PROMPTS[i]
        assert target == (TARGETS[i] if i % 3 == 0 else f"The sum is {2 * i}.")


def test_examples_may_be_of_any_type():
    prompts, targets = np.arange(6).reshape(3, 2), np.array([1, 5, 9])
    found = self_distilled(
        prompts,
        targets,
        generate=lambda prompts, targets: prompts.sum(1),
        check=lambda answer, target: answer == target,
    )
    assert [int(t) for _, t in found.examples] == [1, 5, 9]
    assert found.replaced.tolist() == [True, True, True]


def test_it_says_when_no_answer_is_right():
    generate = lambda prompts, targets: ["none"] * len(prompts)
    with pytest.warns(UserWarning, match="None of the 7 answers is right"):
        found = self_distilled(PROMPTS, TARGETS, generate=generate, check=right)
    assert [t for _, t in found.examples] == TARGETS


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": TARGETS[:3]}, ValueError, "7 prompts and 3 targets"),
        ({"prompts": [], "targets": []}, ValueError, "one at least"),
        ({"prompts": "0+0"}, TypeError, "prompts must be a sequence"),
        ({"generate": lambda p, t: ["x"]}, ValueError, "asked for 7 answers"),
        ({"generate": lambda p, t: (x for x in p)}, ValueError, "asked for 7 answers"),
        ({"check": lambda a, t: a}, TypeError, "check must return True or False"),
        ({"generate": lambda p: p}, TypeError, "generate is called with 2 arguments"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ],
)
def test_a_wrong_helper_is_named(change, error, message):
    given = {
        "prompts": PROMPTS,
        "targets": TARGETS,
        "generate": lambda prompts, targets: list(targets),
        "check": right,
    } | change
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=message):
            self_distilled(given.pop("prompts"), given.pop("targets"), **given)
