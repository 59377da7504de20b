"""Makes the virtual environment behind `make demo` and `make test`.

Needs nothing but Python 3.11 and a C++ compiler. Installs a pinned stack, compiles mmcv's
operators where no wheel fits, and keeps the compiled wheel for the next environment. A second call
finds the environment unchanged and returns at once.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = (3, 11)
FREE_GB = 9  # an environment takes 6, the downloads and the build the rest
CORE = ('torch', 'torchvision', 'numpy', 'setuptools')  # what mmcv compiles against
IMPORTS = 'import mmcv.ops, mmdet, mmseg, mmpretrain, mmvitzoo'


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--stack', choices=('openmmlab', 'onedl'), default='openmmlab')
    parser.add_argument('--venv', type=Path, required=True, help='folder of the virtual environment')
    args = parser.parse_args()
    if sys.version_info[:2] != PYTHON:
        stop(
            f'Python {PYTHON[0]}.{PYTHON[1]} is needed for the pinned versions, {sys.executable} is '
            f'{sys.version.split()[0]}: install it, then make PYTHON=/path/to/python{PYTHON[0]}.{PYTHON[1]}'
        )
    requirements = ROOT / 'requirements' / f'{args.stack}.txt'
    cuda = has_cuda()
    stamp = args.venv / 'ready'
    place = str(args.venv.resolve())
    state = f'{place}\n{fingerprint(requirements, cuda)}'
    if stamp.is_file() and stamp.read_text() == state:
        return
    if stamp.is_file() and stamp.read_text().splitlines()[0] != place:
        shutil.rmtree(args.venv)  # its scripts name the folder where it was made
    check_machine(args.venv)

    started = time.time()
    print(f'Setting up {args.venv} for the {args.stack} stack', flush=True)
    args.venv.mkdir(parents=True, exist_ok=True)
    log = args.venv / 'setup.log'
    log.write_text('')
    run([sys.executable, '-m', 'venv', args.venv], 'making the environment', log)
    pip = [args.venv / 'bin' / 'python', '-m', 'pip', '--disable-pip-version-check']
    pins = [line.strip() for line in requirements.read_text().splitlines() if line.strip() and line[0] != '#']
    core = [pin for pin in pins if re.split('[=<>]', pin)[0] in CORE]
    run([*pip, 'install', *core, 'wheel', 'ninja'], 'installing torch', log)
    mmcv = next(pin for pin in pins if re.match('(onedl-)?mmcv=', pin))
    run([*pip, 'install', '--no-deps', mmcv_wheel(pip, mmcv, core, args.stack, cuda, log)], 'installing mmcv', log)
    run(
        [*pip, 'install', '-r', requirements, *('-r%s' % (ROOT / 'requirements' / name) for name in EXTRA_FILES)],
        'installing the stack',
        log,
    )
    install_project(pip, args.venv, log)
    run([args.venv / 'bin' / 'python', '-c', IMPORTS], 'checking', log)
    stamp.write_text(state)
    print(f'Ready after {clock(time.time() - started)}; the log is {log}', flush=True)


EXTRA_FILES = ('runtime.txt', 'tests.txt', 'export.txt', 'app.txt', 'docs.txt', 'notebooks.txt')


def fingerprint(requirements, cuda):
    """Changes whenever the environment has to be made anew."""
    digest = hashlib.sha256(f'{sys.version} {cuda} {ROOT}'.encode())
    names = [requirements, *(ROOT / 'requirements' / name for name in EXTRA_FILES)]
    for path in [*names, ROOT / 'setup.py', ROOT / 'pyproject.toml', Path(__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def has_cuda():
    """Whether operators can be compiled for, and run on, a CUDA device."""
    device = os.path.exists('/dev/nvidiactl') or shutil.which('nvidia-smi')
    if device and not shutil.which('nvcc'):
        print('A CUDA device but no nvcc: mmcv is compiled for the CPU; for the device, install the CUDA toolkit')
    return bool(device and shutil.which('nvcc'))


def check_machine(venv):
    if not (shutil.which('c++') or shutil.which('g++')):
        stop("no C++ compiler (g++) to build mmcv with: apt-get install g++, or your system's like")
    if not Path(sysconfig.get_paths()['include'], 'Python.h').exists():
        stop(f'no Python headers for {sys.executable}: apt-get install python{PYTHON[0]}.{PYTHON[1]}-dev')
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        stop(f'{sys.executable} cannot make environments: apt-get install python{PYTHON[0]}.{PYTHON[1]}-venv')
    needs = ((venv, 1 if venv.exists() else FREE_GB, 'make VENV'), (cache_folder(), 1, 'make XDG_CACHE_HOME'))
    for folder, need, elsewhere in needs:
        while not folder.exists():
            folder = folder.absolute().parent
        free = shutil.disk_usage(folder).free / 2**30
        if free < need:
            stop(f'{folder} has {free:.1f} GiB of free disk, {need} are needed: make room, or {elsewhere}=/elsewhere')


def cache_folder():
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'mmvitzoo'


def mmcv_wheel(pip, mmcv, core, stack, cuda, log):
    """The wheel of mmcv for this torch and Python, compiled now if it is not in the cache."""
    torch = next(pin for pin in core if pin.startswith('torch='))
    python = f'py{PYTHON[0]}{PYTHON[1]}'
    key = '-'.join([stack, *(re.sub('=+', '', pin) for pin in (mmcv, torch)), python, 'cuda' if cuda else 'cpu'])
    cache = cache_folder() / key
    wheels = sorted(cache.glob('*.whl'))
    if wheels:
        print(f'Reusing {wheels[0]}', flush=True)
        return wheels[0]
    cache.parent.mkdir(parents=True, exist_ok=True)
    print(f'No wheel of {mmcv} for this torch yet: compiling it takes about 10 minutes on two cores', flush=True)
    env = dict(os.environ, MMCV_WITH_OPS='1', FORCE_CUDA='1' if cuda else '0')
    if not cuda:
        env['CUDA_VISIBLE_DEVICES'] = ''  # else mmcv would look for nvcc
    env.setdefault('MAX_JOBS', str(os.cpu_count()))
    # ninja and the compiler's helpers are found through the environment's bin folder.
    env['PATH'] = f'{Path(pip[0]).absolute().parent}{os.pathsep}{env["PATH"]}'
    with tempfile.TemporaryDirectory(dir=cache.parent, prefix=f'.{key}.') as work:
        # Not pip's cache: it would offer a wheel compiled against one torch to another.
        command = [*pip, 'wheel', '-v', '--no-cache-dir', '--no-build-isolation', '--no-deps', '-w', work, mmcv]
        run(command, f'compiling {mmcv}', log, env)
        cache.mkdir(exist_ok=True)
        for wheel in Path(work).glob('*.whl'):
            shutil.move(wheel, cache / wheel.name)
    return next(cache.glob('*.whl'))


def install_project(pip, venv, log):
    run([*pip, 'install', '--no-deps', '-e', ROOT], 'installing mmvitzoo', log)
    # openmim looks for a package's .mim folder in site-packages, where an editable install has none.
    link = next((venv / 'lib').glob('python3*/site-packages')) / 'mmvitzoo'
    if link.is_symlink():
        link.unlink()
    link.symlink_to(ROOT / 'mmvitzoo')


def run(command, label, log, env=None):
    """Runs a command with a live line of what it does; its output goes to the log."""
    live = sys.stdout.isatty()
    started = shown = time.time()
    with open(log, 'ab') as out:
        out.write(f'\n$ {" ".join(map(str, command))}\n'.encode())
        out.flush()
        begin = out.tell()
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=subprocess.STDOUT, env=env)
        while True:
            try:
                process.wait(0.5)
                break
            except subprocess.TimeoutExpired:
                if live or time.time() - shown > 30:
                    shown = time.time()
                    line = f'  {label}: {clock(shown - started)}{progress(log, begin)}'
                    print(f'\r{line:<76}' if live else line, end='' if live else '\n', flush=True)
    if process.returncode:
        tail = log.read_text(errors='replace').splitlines()[-15:]
        stop(f'{label} failed; the end of {log}:\n  ' + '\n  '.join(tail))
    line = f'  {label}: done in {clock(time.time() - started)}'
    print(f'\r{line:<76}' if live else line, flush=True)


def progress(log, begin):
    """How many files ninja has compiled, as the end of the log from the byte ``begin`` on tells."""
    with open(log, 'rb') as file:
        file.seek(max(begin, log.stat().st_size - 20000))
        steps = re.findall(rb'^\s*\[(\d+)/(\d+)\]', file.read(), re.MULTILINE)
    return f', file {int(steps[-1][0])} of {int(steps[-1][1])}' if steps else ''


def clock(seconds):
    return f'{int(seconds) // 60} min {int(seconds) % 60:02d} s'


def stop(message):
    sys.exit(f'\nset-up stopped: {message}')


if __name__ == '__main__':
    main()
