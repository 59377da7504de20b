"""Docstrings begin with a verb or a noun, and `Args` entries name the thing."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ('mmvitzoo', 'tools', 'tests', 'configs', 'benchmarks', 'docs')
FIRST_WORDS = ('What', 'How', 'Where', 'Which', 'Whether', 'Who', 'Whose', 'Of')
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED):
            doc = ast.get_docstring(node)
            if doc:
                yield getattr(node, 'name', 'module'), doc


def problems(doc):
    if doc.split()[0].strip('`*:,') in FIRST_WORDS:
        yield f'begins with {doc.split()[0]}'
    for section in re.findall(r'^(?:Args|Attributes|Returns):\n((?:[ ]{4}.*\n?|\n)+)', doc, re.MULTILINE):
        for entry in re.findall(r'^ {4}(?:\S+: )?(Of|Whether|What|How) ', section, re.MULTILINE):
            yield f'an entry begins with {entry}'


def test_docstrings_begin_with_a_verb_or_a_noun():
    found = [
        f'{path.relative_to(ROOT)}: {name} {problem}'
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob('*.py'))
        if 'data' not in path.parts
        for name, doc in docstrings(path.read_text(encoding='utf-8'))
        for problem in problems(doc)
    ]
    assert not found, '\n'.join(found)


def test_problems_are_found():
    doc = 'Of a map.\n\nArgs:\n    x: Of (B, C).\n    y: Whether to.\n    z: Width.\n\nReturns:\n    How many.\n'
    assert list(problems(doc)) == [
        'begins with Of',
        'an entry begins with Of',
        'an entry begins with Whether',
        'an entry begins with How',
    ]
    assert not list(problems('Map.\n\nArgs:\n    x: Map of (B, C).\n'))
