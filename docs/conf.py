"""Configuration of Sphinx: `make docs`, or sphinx-build -W docs docs/_build.

Links in the pages are relative to the repository and work there as well. On the site, a link to a page stays on the
site, and a link to any other file downloads it. Directives of Sphinx are comments, `<!-- {name} ... -->`, which GitHub
does not show.
"""

import os
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from mmvitzoo.version import __version__  # noqa: E402

project = 'MMViTZoo'
author = 'MMViTZoo contributors'
copyright = author
release = __version__

extensions = [
    'myst_nb',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
    'sphinx_copybutton',
]
exclude_patterns = ['jupyter_execute', '_build']
nitpicky = True
# References to names of other packages have no target.
nitpick_ignore_regex = [('py:.*', r'(?!mmvitzoo).*')]

myst_heading_anchors = 3
nb_execution_mode = 'off'

autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
autodoc_inherit_docstrings = False
napoleon_use_ivar = True

html_theme = 'furo'
html_title = f'MMViTZoo {release}'
html_static_path = ['_static']
html_css_files = ['site.css']
copybutton_prompt_text = r'>>> |\.\.\. '
copybutton_prompt_is_regexp = True


def setup(app):
    app.connect('source-read', rewrite_links)


def rewrite_links(app, docname, source):
    """Replaces an inclusion by the included file, makes its links relative to the page, and uncomments directives."""
    page = DOCS / f'{docname}.md'
    if not page.exists():
        return  # a notebook
    origin = included_file(page) or page
    pages = {included_file(other): other for other in DOCS.rglob('*.md')}

    def rewrite(match):
        if match[1] is None:  # a code block
            return match[0]
        target = (origin.parent / match[1]).resolve()
        return f']({os.path.relpath(pages.get(target, target), page.parent)}'

    block_or_link = r'^```.*?^```|\]\((?!https?:|#)([^)#]+)'
    text = re.sub(block_or_link, rewrite, origin.read_text(), flags=re.MULTILINE | re.DOTALL)
    source[0] = re.sub(r'^<!-- (\{[\w-]+\}.*?)\n-->$', r'```\1\n```', text, flags=re.MULTILINE | re.DOTALL)


def included_file(page):
    """Returns the file that a page includes, or None."""
    match = re.search(r'^<!-- \{include\} (\S+)\n-->$', page.read_text(), flags=re.MULTILINE)
    return match and (page.parent / match[1]).resolve()
