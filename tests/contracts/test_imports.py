"""What begins with an underscore is for its own package alone.

The layers are held by import-linter. It knows of no names with an underscore; this
looks at the same graph of imports.
"""

import grimp


def owner(module):
    """The package that a module belongs to, and whether it is private there."""
    _, package, *inside = module.split(".")
    return package, any(name.startswith("_") for name in inside)


def test_no_package_imports_what_is_private_to_another():
    graph = grimp.build_graph("jaxsparse")
    wrong = []
    for module in sorted(graph.modules - {"jaxsparse"}):
        for other in graph.find_modules_directly_imported_by(module) - {"jaxsparse"}:
            package, private = owner(other)
            if private and package != owner(module)[0]:
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_there_is_something_to_find():
    assert owner("jaxsparse.patterns._keys") == ("patterns", True)
    assert owner("jaxsparse.primitives._row") == ("primitives", True)
    assert owner("jaxsparse._checks") == ("_checks", False)
    assert owner("jaxsparse.primitives.axes") == ("primitives", False)
