"""Public modules, classes and functions have type annotations and docstrings."""

import dataclasses
import inspect
import pkgutil
from importlib import import_module

import mmvitzoo


def is_defined_in(value, module_name):
    """Returns whether a function or class is defined in a module instead of imported."""
    return getattr(value, '__module__', None) == module_name


def is_documented_by_base(owner, name, function):
    """Returns whether a method overrides a documented method of the same signature."""
    inherited = next((vars(base)[name] for base in owner.__mro__[1:] if name in vars(base)), None)
    inherited = getattr(inherited, 'fget', getattr(inherited, '__func__', inherited))
    return (
        callable(inherited)
        and bool(inspect.getdoc(inherited))
        and inspect.signature(inherited) == inspect.signature(function)
    )


def problems_of_function(function, name, is_method=False):
    """Lists parameters, and the return value except of a constructor, without annotation."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[is_method:]
    missing = [parameter.name for parameter in parameters if parameter.annotation is parameter.empty]
    if signature.return_annotation is signature.empty and function.__name__ != '__init__':
        missing.append('return')
    return [f'{name}: no type of {", ".join(missing)}'] if missing else []


def problems_of_class(owner, name):
    # inspect.getdoc would return that of nn.Module. A dataclass without a docstring gets its signature as one.
    doc = vars(owner).get('__doc__')
    generated = dataclasses.is_dataclass(owner) and doc and doc.startswith(f'{owner.__name__}(')
    problems = [] if doc and not generated else [f'{name}: no docstring']
    for member, value in vars(owner).items():
        if member.startswith('_') and member != '__init__':
            continue
        is_static = isinstance(value, staticmethod)
        value = getattr(value, 'fget', getattr(value, '__func__', value))
        if inspect.isclass(value) and is_defined_in(value, owner.__module__):
            problems += problems_of_class(value, f'{name}.{member}')
        elif inspect.isfunction(value) and is_defined_in(value, owner.__module__):
            problems += problems_of_function(value, f'{name}.{member}', is_method=not is_static)
            if member != '__init__' and not value.__doc__ and not is_documented_by_base(owner, member, value):
                problems.append(f'{name}.{member}: no docstring')
    return problems


def problems_of_module(module):
    problems = [] if module.__doc__ else [f'{module.__name__}: no docstring']
    for member, value in vars(module).items():
        if member.startswith('_') or not is_defined_in(value, module.__name__):
            continue
        name = f'{module.__name__}.{member}'
        if inspect.isclass(value):
            problems += problems_of_class(value, name)
        elif inspect.isfunction(value):
            problems += problems_of_function(value, name)
            if not value.__doc__:
                problems.append(f'{name}: no docstring')
    return problems


def test_public_api_has_types_and_docstrings():
    names = [name for _, name, _ in pkgutil.walk_packages(mmvitzoo.__path__, 'mmvitzoo.')]
    public = [name for name in names if not any(part.startswith('_') for part in name.split('.'))]
    assert 'mmvitzoo.models.layers.attention' in public
    modules = [mmvitzoo, *(import_module(name) for name in public)]
    problems = [line for module in modules for line in problems_of_module(module)]
    assert not problems, '\n'.join(problems)
