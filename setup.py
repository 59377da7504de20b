"""Builds mmvitzoo. An installed package contains its configs and tools in ``mmvitzoo/.mim``."""

import os
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
MIM_EXTENSION = ('configs', 'tools', 'model-index.yml')  # openmim reads these from the .mim folder of a package


class BuildWithMim(build_py):
    """Build command that adds ``mmvitzoo/.mim``: copies in a wheel, symbolic links in an editable install."""

    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False):  # setuptools >= 64
            target = ROOT / 'mmvitzoo' / '.mim'
            target.mkdir(exist_ok=True)
            for name in MIM_EXTENSION:
                if not (target / name).exists():
                    (target / name).symlink_to(os.path.relpath(ROOT / name, target))
            return
        target = Path(self.build_lib, 'mmvitzoo', '.mim')
        for name in MIM_EXTENSION:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns('__pycache__')
                shutil.copytree(ROOT / name, target / name, ignore=ignored, dirs_exist_ok=True)
            else:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, target / name)


def read_version():
    values = {}
    exec((ROOT / 'mmvitzoo' / 'version.py').read_text(), values)
    return values['__version__']


def read_requirements(name):
    lines = (ROOT / 'requirements' / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


setup(
    name='mmvitzoo',
    version=read_version(),
    description='Vision-transformer backbones for MMDetection, MMSegmentation and MMPretrain',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    author='MMViTZoo contributors',
    python_requires='>=3.8',
    packages=find_packages(include=['mmvitzoo', 'mmvitzoo.*']),
    install_requires=read_requirements('runtime.txt'),
    extras_require={
        # The toolboxes, for an environment with PyTorch. For machines without a compiler, see docs/operators.md.
        'openmmlab': [line for line in read_requirements('openmmlab.txt') if not line.startswith('torch')],
        **{name: read_requirements(f'{name}.txt') for name in ('app', 'export', 'demo', 'tests', 'tools')},
    },
    cmdclass={'build_py': BuildWithMim},
    zip_safe=False,
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
