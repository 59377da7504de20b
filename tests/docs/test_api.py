"""What is public has types and a docstring."""

import dataclasses
import inspect
import pkgutil
from importlib import import_module

import mmvitzoo


def is_own(thing, home):
    """Whether a function or class was written in a module, not imported into it."""
    return getattr(thing, '__module__', None) == home


def is_documented_by_base(owner, name, function):
    """Whether an override only repeats a method whose documentation fits it as it stands."""
    inherited = next((vars(base)[name] for base in owner.__mro__[1:] if name in vars(base)), None)
    inherited = getattr(inherited, 'fget', getattr(inherited, '__func__', inherited))
    return (
        callable(inherited)
        and bool(inspect.getdoc(inherited))
        and inspect.signature(inherited) == inspect.signature(function)
    )


def lacks_of_function(function, name, is_method=False):
    """What has no annotation: parameters and the return value; of a constructor, parameters."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[is_method:]
    bare = [parameter.name for parameter in parameters if parameter.annotation is parameter.empty]
    if signature.return_annotation is signature.empty and function.__name__ != '__init__':
        bare.append('return')
    return [f'{name}: no type of {", ".join(bare)}'] if bare else []


def lacks_of_class(owner, name):
    # Looked up in the class itself, for getdoc finds nn.Module's; a dataclass without one is given its signature.
    doc = vars(owner).get('__doc__')
    generated = dataclasses.is_dataclass(owner) and doc and doc.startswith(f'{owner.__name__}(')
    lacks = [] if doc and not generated else [f'{name}: no docstring']
    for member, value in vars(owner).items():
        if member.startswith('_') and member != '__init__':
            continue
        is_static = isinstance(value, staticmethod)
        value = getattr(value, 'fget', getattr(value, '__func__', value))
        if inspect.isclass(value) and is_own(value, owner.__module__):
            lacks += lacks_of_class(value, f'{name}.{member}')
        elif inspect.isfunction(value) and is_own(value, owner.__module__):
            lacks += lacks_of_function(value, f'{name}.{member}', is_method=not is_static)
            if member != '__init__' and not value.__doc__ and not is_documented_by_base(owner, member, value):
                lacks.append(f'{name}.{member}: no docstring')
    return lacks


def lacks_of_module(module):
    lacks = [] if module.__doc__ else [f'{module.__name__}: no docstring']
    for member, value in vars(module).items():
        if member.startswith('_') or not is_own(value, module.__name__):
            continue
        name = f'{module.__name__}.{member}'
        if inspect.isclass(value):
            lacks += lacks_of_class(value, name)
        elif inspect.isfunction(value):
            lacks += lacks_of_function(value, name)
            if not value.__doc__:
                lacks.append(f'{name}: no docstring')
    return lacks


def test_public_api_has_types_and_docstrings():
    names = [name for _, name, _ in pkgutil.walk_packages(mmvitzoo.__path__, 'mmvitzoo.')]
    public = [name for name in names if not any(part.startswith('_') for part in name.split('.'))]
    assert 'mmvitzoo.models.layers.attention' in public
    modules = [mmvitzoo, *(import_module(name) for name in public)]
    lacks = [line for module in modules for line in lacks_of_module(module)]
    assert not lacks, '\n'.join(lacks)
