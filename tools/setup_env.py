"""Creates the virtual environment for `make demo`, `make test` and the other targets.

Requires Python 3.11 and a package index, but no compiler, since mmcv-lite uses the operators of torchvision. If the
environment is complete, the script returns at once. With ``--ops compiled``, mmcv is compiled and its wheel is cached.
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
FREE_GB = 9  # an environment takes 6 GB, downloads the rest
STACK_IMPORTS = 'import mmcv.ops, mmdet, mmseg, mmpretrain, mmvitzoo'
# Requirement files of each target.
EXTRAS = {
    'env': (),
    'demo': ('demo',),
    'test': ('demo', 'tests', 'tools'),
    'test-slow': ('demo', 'tests', 'tools', 'app', 'browser', 'export', 'docs', 'notebooks'),
    'docs': ('demo', 'app', 'docs', 'notebooks'),
}
MARKER = '.mmvitzoo'  # file in environments that this script created and may replace
NO_NETWORK = re.compile(r'NewConnectionError|name resolution|Network is unreachable|Max retries exceeded|timed out')
NO_SPACE = re.compile('No space left on device|Disk quota exceeded')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--stack', choices=('openmmlab', 'onedl'), default='openmmlab', help='toolbox versions')
    parser.add_argument('--ops', choices=('torchvision', 'compiled'), default='torchvision', help='operators of mmcv')
    parser.add_argument('--for', dest='target', choices=EXTRAS, default='env', help='target whose packages to install')
    parser.add_argument('--venv', type=Path, required=True, help='folder of the virtual environment')
    args = parser.parse_args()
    if sys.version_info[:2] != PYTHON:
        fail(
            f'the pinned versions require Python {PYTHON[0]}.{PYTHON[1]}, but {sys.executable} is '
            f'{sys.version.split()[0]}: install it, then make PYTHON=/path/to/python{PYTHON[0]}.{PYTHON[1]}'
        )
    start = time.time()
    # The log lies beside the environment, since an incomplete environment is removed.
    log = args.venv.parent / f'{args.venv.name}-setup.log'
    ready = args.venv / 'ready'
    state = fingerprint(args.venv, args.stack, args.ops)
    if not (ready.is_file() and ready.read_text() == state):
        check_machine(args.venv, args.ops)
        check_owner(args.venv)
        print(f'Setting up {args.venv} for the {args.stack} stack', flush=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text('')
        replace_environment(args.venv, args.stack, args.ops, log)
        ready.write_text(state)
    install_project(args.venv, args.ops, log)
    for name in EXTRAS[args.target]:
        install_extra(args.venv, args.stack, name, log)
    if time.time() - start > 2:
        print(f'Ready after {format_time(time.time() - start)}; the log is {log}', flush=True)


def check_owner(venv):
    """Refuses to replace a folder that this script did not create."""
    if venv.is_symlink() or (venv.exists() and not any((venv / name).exists() for name in (MARKER, 'ready'))):
        fail(f'{venv} exists and was not created by this script: remove it, or make VENV=/other/folder')


def replace_environment(venv, stack, ops, log):
    """Creates the environment; restores the previous one if that fails."""
    old = venv.with_name(f'{venv.name}-old')
    shutil.rmtree(old, ignore_errors=True)
    if venv.exists():
        venv.rename(old)
    try:
        venv.mkdir(parents=True)
        (venv / MARKER).touch()
        make_environment(venv, stack, ops, log)
    except BaseException:
        shutil.rmtree(venv, ignore_errors=True)
        if old.exists():
            old.rename(venv)
        raise
    shutil.rmtree(old, ignore_errors=True)


def make_environment(venv, stack, ops, log):
    """Creates the environment and installs the stack in it."""
    # The base interpreter, because an activated environment may be the one that is replaced.
    run([getattr(sys, '_base_executable', sys.executable), '-m', 'venv', venv], 'creating the environment', log)
    pins = read_pins(stack)
    mmcv = next(pin for pin in pins if re.match('(onedl-)?mmcv', pin))
    packages = [pin for pin in pins if pin != mmcv]
    if ops == 'compiled':
        torch = [pin for pin in pins if re.match('(torch|torchvision|numpy|setuptools)[=<>]', pin)]
        run([*pip(venv), 'install', *torch, 'wheel', 'ninja'], 'installing torch', log)
        packages.append(compiled_mmcv(venv, mmcv.replace('mmcv-lite', 'mmcv'), torch[0], stack, log))
    elif stack == 'onedl':
        # There is no wheel without operators. Do not cache it: pip would use it in place of a compiled wheel.
        setuptools = next(pin for pin in pins if pin.startswith('setuptools'))
        run([*pip(venv), 'install', setuptools, 'wheel'], 'installing setuptools', log)
        with tempfile.TemporaryDirectory() as work:
            options = ['--no-cache-dir', '--no-build-isolation', '--no-deps', '-w', work]
            env = dict(os.environ, MMCV_WITH_OPS='0')
            run([*pip(venv), 'wheel', *options, mmcv], f'building a wheel of {mmcv}', log, env)
            run([*pip(venv), 'install', '--no-deps', *Path(work).glob('*.whl')], f'installing {mmcv}', log)
    else:
        packages.append(mmcv)
    run([*pip(venv), 'install', *packages, '-r', ROOT / 'requirements/runtime.txt'], 'installing the stack', log)


def install_project(venv, ops, log):
    """Installs the package and the operators if their sources have changed."""
    digest = hashlib.sha256()
    for path in [ROOT / 'setup.py', ROOT / 'mmvitzoo/version.py', *sorted((ROOT / 'mmvitzoo' / 'ops').glob('*.py'))]:
        digest.update(path.read_bytes())
    stamp = venv / 'ready-project'
    if stamp.is_file() and stamp.read_text() == digest.hexdigest():
        return
    run([*pip(venv), 'install', '--no-deps', '-e', ROOT], 'installing mmvitzoo', log)
    # openmim expects the .mim folder of a package in site-packages, where an editable install has none.
    link = next((venv / 'lib').glob('python3*/site-packages')) / 'mmvitzoo'
    if not link.is_symlink():
        link.symlink_to(ROOT / 'mmvitzoo')
    python = venv / 'bin' / 'python'
    if ops == 'torchvision':
        run([python, '-m', 'mmvitzoo.ops', 'install'], 'installing the operators', log)
    run([python, '-c', STACK_IMPORTS], 'checking the imports', log)
    stamp.write_text(digest.hexdigest())


def install_extra(venv, stack, name, log):
    """Installs one requirement file if it has changed."""
    requirements = ROOT / 'requirements' / f'{name}.txt'
    stamp = venv / f'ready-{name}'
    if stamp.is_file() and stamp.read_bytes() == requirements.read_bytes():
        return
    with tempfile.TemporaryDirectory() as work:
        # Constraints keep the versions of the stack.
        constraints = Path(work, 'constraints.txt')
        constraints.write_text('\n'.join(pin for pin in read_pins(stack) if 'mmcv' not in pin))
        run([*pip(venv), 'install', '-r', requirements, '-c', constraints], f'installing {name}', log)
    shutil.copy(requirements, stamp)


def read_pins(stack):
    """Returns the pinned requirements of a stack."""
    lines = (ROOT / 'requirements' / f'{stack}.txt').read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith('#')]


def fingerprint(venv, stack, ops):
    """Returns a hash that changes when the environment must be recreated, also when its folder has moved."""
    digest = hashlib.sha256(f'{sys.version} {stack} {ops} {ROOT} {venv.resolve()} {has_cuda(ops)}'.encode())
    for name in (stack, 'runtime'):
        digest.update((ROOT / f'requirements/{name}.txt').read_bytes())
    return digest.hexdigest()


def pip(venv):
    """Returns the command line of the environment's pip."""
    return [venv / 'bin' / 'python', '-m', 'pip', '--disable-pip-version-check', '--retries', '2']


def has_cuda(ops):
    """Returns True if mmcv is compiled for CUDA; torchvision's operators support CUDA without a compiler."""
    device = os.path.exists('/dev/nvidiactl') or shutil.which('nvidia-smi')
    if ops == 'compiled' and device and not shutil.which('nvcc'):
        print('There is a CUDA device but no nvcc: mmcv is compiled for the CPU; for CUDA, install the CUDA toolkit')
    return bool(ops == 'compiled' and device and shutil.which('nvcc'))


def check_machine(venv, ops):
    """Checks for venv, a compiler if mmcv is compiled, and free disk space."""
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        fail(f'{sys.executable} cannot create environments: apt-get install python{PYTHON[0]}.{PYTHON[1]}-venv')
    if ops == 'compiled':
        if not (shutil.which('c++') or shutil.which('g++')):
            fail('there is no C++ compiler (g++) for mmcv: apt-get install g++, or make without OPS=compiled')
        if not Path(sysconfig.get_paths()['include'], 'Python.h').exists():
            fail(f'there are no Python headers for {sys.executable}: apt-get install python{PYTHON[0]}.{PYTHON[1]}-dev')
    folder = venv.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    if free < FREE_GB:
        fail(
            f'{folder} has {free:.1f} GiB of free disk space, but {FREE_GB} GiB are required: '
            'free some space, or make VENV=/other/folder'
        )


def compiled_mmcv(venv, mmcv, torch, stack, log):
    """Returns the wheel of mmcv for this torch and Python; compiles it if it is not in the cache."""
    device = 'cuda' if has_cuda('compiled') else 'cpu'
    python = f'py{PYTHON[0]}{PYTHON[1]}'
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'mmvitzoo'
    folder = cache / '-'.join([stack, *(re.sub('=+', '', pin) for pin in (mmcv, torch)), python, device])
    wheels = sorted(folder.glob('*.whl'))
    if wheels:
        print(f'Reusing {wheels[0]}', flush=True)
        return wheels[0]
    cache.mkdir(parents=True, exist_ok=True)
    print(f'There is no wheel of {mmcv} for this torch: compiling it takes about 8 minutes on two cores', flush=True)
    env = dict(os.environ, MMCV_WITH_OPS='1', FORCE_CUDA=str(int(device == 'cuda')))
    if device == 'cpu':
        env['CUDA_VISIBLE_DEVICES'] = ''  # otherwise mmcv looks for nvcc
    env.setdefault('MAX_JOBS', str(len(os.sched_getaffinity(0))))
    env.setdefault('CFLAGS', '-g0')  # debug information doubles the compile time
    # ninja is installed in the bin folder of the environment.
    env['PATH'] = f'{(venv / "bin").absolute()}{os.pathsep}{env["PATH"]}'
    with tempfile.TemporaryDirectory(dir=cache, prefix=f'.{folder.name}.') as work:
        # Do not use pip's cache: pip would reuse a wheel that was compiled for another torch.
        options = ['-v', '--no-cache-dir', '--no-build-isolation', '--no-deps', '-w', work]
        run([*pip(venv), 'wheel', *options, mmcv], f'compiling {mmcv}', log, env)
        folder.mkdir(exist_ok=True)
        for wheel in Path(work).glob('*.whl'):
            shutil.move(wheel, folder / wheel.name)
    return next(folder.glob('*.whl'))


def run(command, label, log, env=None):
    """Runs a command with a progress line; its output goes to the log."""
    live = sys.stdout.isatty()
    start = shown = time.time()
    with open(log, 'ab') as out:
        begin = out.tell()
        out.write(f'\n$ {" ".join(map(str, command))}\n'.encode())
        out.flush()
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=subprocess.STDOUT, env=env)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if live or time.time() - shown > 30:
                    shown = time.time()
                    line = f'  {label}: {format_time(shown - start)}'
                    print(f'\r{line:<76}' if live else line, end='' if live else '\n', flush=True)
        finally:
            process.kill()
    if process.wait():
        output = log.read_bytes()[begin:].decode(errors='replace')
        if NO_SPACE.search(output):
            fail(f'{label}: no space left on the device; free some space, also for TMPDIR and PIP_CACHE_DIR; see {log}')
        if NO_NETWORK.search(output):
            fail(
                f'{label}: the package index does not answer; check the network, HTTPS_PROXY and PIP_INDEX_URL, '
                f'then run make again; see {log}'
            )
        tail = ' | '.join(output.strip().splitlines()[-3:])
        fail(f'{label}: {tail}; see {log}')
    line = f'  {label}: done in {format_time(time.time() - start)}'
    print(f'\r{line:<76}' if live else line, flush=True)


def format_time(seconds):
    """Formats seconds as minutes and seconds."""
    return f'{int(seconds) // 60} min {int(seconds) % 60:02d} s'


def fail(message):
    """Exits with an error message."""
    sys.exit(f'setup failed: {message}')


if __name__ == '__main__':
    main()
