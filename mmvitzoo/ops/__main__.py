"""Command line that installs, removes or describes the operators."""

import argparse
import sys

from . import InstallError, install, remove, status

COMMANDS = dict(install=install, remove=remove, status=status)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='python -m mmvitzoo.ops', description="Install torchvision's operators in an mmcv without compiled ones."
    )
    parser.add_argument('command', choices=COMMANDS, help='install or remove mmcv/_ext.py, or show its status')
    try:
        print(COMMANDS[parser.parse_args().command]())
    except InstallError as error:
        sys.exit(f'{parser.prog}: {error}')


if __name__ == '__main__':
    main()
