"""A small convolutional network for digits, in flax Linen."""

import flax.linen as nn
import jax
import numpy as np
from _data import digits
from _training import cross_entropy

data = digits()


class Net(nn.Module):
    """Two convolutions and two dense layers: 151,072 weights."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


net = Net()


def init(seed: int):
    """Its parameters."""
    return net.init(jax.random.key(seed), data.x[:1])["params"]


def loss_fn(params, state, batch):
    """The mean cross entropy of a batch; the state is passed on."""
    logits = net.apply({"params": params}, batch[0])
    return cross_entropy(logits, batch[1]), state


@jax.jit
def predict(params):
    """The logits of all test images."""
    return net.apply({"params": params}, data.x_test)


def accuracy(params) -> float:
    """The fraction of the test images whose class is found."""
    return float(np.mean(np.argmax(predict(params), axis=-1) == data.y_test))
