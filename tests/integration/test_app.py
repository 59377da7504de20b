"""Web page in headless Chromium, and the restrictions of a page for other machines."""

import json
import os
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path
from urllib.parse import quote

import mmcv
import numpy as np
import pytest
import torch

import mmvitzoo
from mmvitzoo import list_models
from mmvitzoo.checkpoints import save
from mmvitzoo.inference import load_model

DETECTOR = 'retinanet_scalablevit-mini_fpn_mini-coco'
CLASSIFIER = 'plainvit-mini_mini-classes'
TIMEOUT = 60_000  # milliseconds


@pytest.fixture(scope='module')
def app():
    """Imports the module lazily, since it requires gradio."""
    return import_module('mmvitzoo.app')


@pytest.fixture(scope='module')
def page(app):
    from playwright.sync_api import sync_playwright

    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    assert chromium, 'this test requires Chromium: apt-get install chromium'
    server = app.build_app()
    _, url, _ = server.launch(server_name='127.0.0.1', prevent_thread_lock=True, quiet=True)
    flags = ['--no-sandbox', '--disable-gpu', '--disable-background-networking']
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        page.set_default_timeout(TIMEOUT)
        page.goto(url)
        yield page
        browser.close()
    server.close()


@pytest.fixture(scope='module')
def checkpoints(workspace):
    folder = workspace / 'app_checkpoints'
    folder.mkdir()
    for name in (DETECTOR, CLASSIFIER):
        torch.manual_seed(0)
        save(load_model(name).state_dict(), folder / f'{name}.pth')
    return folder


def submit(page, config, checkpoint):
    page.get_by_label('Config name or path').fill(config)
    page.get_by_label('Config name or path').press('Enter')
    page.get_by_label('Checkpoint').fill(str(checkpoint))
    page.get_by_role('button', name='Run').click()


@pytest.mark.slow
def test_page_filters_predicts_and_recovers_from_errors(page, workspace, checkpoints):
    from playwright.sync_api import expect

    expect(page.get_by_role('heading', name='MMViTZoo')).to_be_visible(timeout=TIMEOUT)
    page.get_by_role('button', name='Run').click()
    expect(page.get_by_text('choose a config first')).to_be_visible(timeout=TIMEOUT)

    page.get_by_label('Family').fill('vitae')
    page.get_by_label('Family').press('Enter')
    for _ in range(60):  # an open list is not updated: close and open it until it is
        page.get_by_role('heading', name='MMViTZoo').click()
        page.get_by_label('Config name or path').click()
        page.wait_for_timeout(500)
        if page.get_by_role('option').count() == len(list_models('vitae')):
            break
    expect(page.get_by_role('option')).to_have_text([re.compile(name) for name in list_models('vitae')])
    page.get_by_label('Family').fill('all')
    page.get_by_label('Family').press('Enter')

    image = sorted((workspace / 'data/mini/val').glob('*.jpg'))[0]
    page.locator('input[type=file]').first.set_input_files(image)
    expect(page.locator('img[src*="gradio_api/file"]')).to_have_count(1, timeout=TIMEOUT)
    submit(page, CLASSIFIER, '')
    expect(page.get_by_text('The weights are random')).to_be_visible(timeout=TIMEOUT)
    expect(page.get_by_text('1.2 M parameters; 1.9 GFLOPs for an image of 224 x 224 pixels.')).to_be_visible()
    expect(page.get_by_text('Latency: ')).to_be_visible()

    submit(page, DETECTOR, checkpoints / f'{DETECTOR}.pth')
    expect(page.get_by_text('2.9 M parameters; 28.3 GFLOPs')).to_be_visible(timeout=TIMEOUT)
    expect(page.get_by_text('The weights are random')).to_be_hidden()
    expect(page.get_by_role('columnheader', name='box').first).to_be_visible()
    images = page.locator('img[src*="gradio_api/file"]')
    expect(images).to_have_count(2)  # the drawn prediction and the uploaded image
    natural_size = 'x => [x.naturalWidth, x.naturalHeight]'
    assert images.nth(0).evaluate(natural_size) == images.nth(1).evaluate(natural_size)
    figure = page.get_by_test_id('matplotlib').locator('img')
    assert figure.evaluate('x => x.naturalWidth') >= 1000

    submit(page, DETECTOR, checkpoints / f'{CLASSIFIER}.pth')
    expect(page.get_by_text(f'{CLASSIFIER}.pth: the keys fit no')).to_be_visible(timeout=TIMEOUT)
    submit(page, 'resnet50', checkpoints / f'{CLASSIFIER}.pth')
    expect(page.get_by_text('resnet50: no such config')).to_be_visible(timeout=TIMEOUT)
    submit(page, CLASSIFIER, checkpoints / f'{CLASSIFIER}.pth')
    expect(page.get_by_text('1.2 M parameters')).to_be_visible(timeout=TIMEOUT)  # waits for the end of the run


@pytest.mark.slow
def test_run_without_image_is_an_error(app):
    with pytest.raises(app.gr.Error, match='upload an image first'):
        app.run(CLASSIFIER, '', None, 0.3)


@pytest.mark.slow
def test_cost_of_unsupported_model(app, monkeypatch):
    def measure(config):
        raise NotImplementedError('Detector has unsupported modules: gan_head')

    monkeypatch.setattr(app, 'measure', measure)
    cost = app.cost_of.__wrapped__(DETECTOR)
    assert cost == 'FLOPs: not available, Detector has unsupported modules: gan_head.'


@pytest.mark.slow
def test_large_image_is_resized_for_feature_maps(app, tmp_path):
    mmcv.imwrite(np.random.RandomState(0).randint(256, size=(700, 1400, 3), dtype=np.uint8), str(tmp_path / 'a.png'))
    figure = app.features(app.Predictor(CLASSIFIER), str(tmp_path / 'a.png'))
    assert figure.axes[0].get_xlabel() == '320 x 640 pixels'


@pytest.mark.slow
@pytest.mark.parametrize('host, public', [('0.0.0.0', True), ('192.168.0.2', True), ('localhost', False)])
def test_command_line_options(app, monkeypatch, tmp_path, host, public):
    built, launched = [], []
    monkeypatch.setattr(app.processing_utils, 'async_ssrf_protected_download', None)  # restored after the test
    monkeypatch.setattr(app, 'build_app', lambda *args: built.append(args) or app.gr.Blocks())
    monkeypatch.setattr(app.gr.Blocks, 'launch', lambda page, **options: launched.append(options))
    monkeypatch.setattr(sys, 'argv', ['app.py', '--host', host, '--port', '8080', '--checkpoints', str(tmp_path)])
    app.main()
    assert built == [(tmp_path, public)]
    (options,) = launched
    assert options.items() >= dict(server_name=host, server_port=8080, share=False).items()
    assert ('max_file_size' in options) == ('app_kwargs' in options) == public


@pytest.mark.slow
def test_checkpoints_must_be_a_folder(app, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, 'argv', ['app.py', '--checkpoints', str(tmp_path / 'missing')])
    with pytest.raises(SystemExit):
        app.main()
    assert f'--checkpoints must be a folder, got {tmp_path}/missing' in capsys.readouterr().err


class Client:
    """Sends the requests of a browser to a page."""

    def __init__(self, url):
        import httpx

        self.http = httpx.Client(base_url=f'{url}gradio_api', timeout=TIMEOUT / 1000)

    def upload(self, content):
        return self.http.post('/upload', files=dict(files=('image.jpg', content)))

    def run(self, config, checkpoint, image, score_thr=0.3):
        """Returns the event with which the page answers, `complete` or `error`, and its data."""
        event = self.http.post('/call/run', json=dict(data=[config, checkpoint, image, score_thr])).json()['event_id']
        answer = self.http.get(f'/call/run/{event}').text
        event, data = re.search('event: (complete|error)\ndata: (.*)', answer).groups()
        return event, json.loads(data)


def file_data(path):
    return dict(path=str(path), meta=dict(_type='gradio.FileData'))


@pytest.fixture(scope='module')
def folder(checkpoints):
    """Creates a folder of checkpoints with symlinks to a checkpoint and a folder outside."""
    folder = checkpoints / 'public'
    (folder / 'runs').mkdir(parents=True)
    outside = checkpoints / f'{CLASSIFIER}.pth'
    shutil.copy(outside, folder / 'runs/a.pth')
    shutil.copy(outside, folder / 'replaced.pth')
    (folder / 'broken.pth').write_text('no checkpoint')
    (folder / 'notes.txt').write_text('no checkpoint')
    (folder / 'inside.pth').symlink_to('runs/a.pth')
    (folder / 'link.pth').symlink_to(outside)
    (folder / 'linked').symlink_to(checkpoints)
    return folder


@pytest.fixture(scope='module')
def public(app, folder):
    """Serves a page for other machines, on a loopback address that is not one of `LOOPBACK`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, 'TIMING_SECONDS', 0)
        patch.setattr(app.processing_utils, 'async_ssrf_protected_download', None)  # restored after the tests
        server, url, _ = app.serve('127.0.0.2', None, folder, prevent_thread_lock=True, quiet=True)
        yield Client(url)
        server.get_blocks().close()


@pytest.fixture(scope='module')
def image(workspace):
    return sorted((workspace / 'data/mini/val').glob('*.jpg'))[0]


@pytest.fixture(scope='module')
def uploaded(public, image):
    (path,) = public.upload(image.read_bytes()).json()
    return path


@pytest.mark.slow
def test_public_page_runs_listed_configs_and_checkpoints(public, image, uploaded):
    assert public.http.get(f'/file={uploaded}').content == image.read_bytes()
    for checkpoint, random in (('runs/a.pth', False), ('inside.pth', False), ('', True), (None, True)):
        event, data = public.run(CLASSIFIER, checkpoint, file_data(uploaded))
        assert event == 'complete' and '1.2 M parameters' in data[2]
        assert ('The weights are random' in data[2]) == random
    event, data = public.run(CLASSIFIER, 'broken.pth', file_data(uploaded))
    assert event == 'error' and data['error'].startswith('broken.pth: ')  # without the path of the folder


@pytest.mark.slow
def test_public_page_refuses_other_configs(app, public, uploaded, tmp_path):
    executed = tmp_path / 'executed'
    config = tmp_path / 'config.py'
    config.write_text(f'open({str(executed)!r}, "w").close()')
    zoo = next(Path(mmvitzoo.__file__).parents[1].glob(f'configs/*/{CLASSIFIER}.py'))
    relative = os.path.relpath(config)
    assert relative.startswith('..')
    for name in map(str, (zoo, config, tmp_path / 'missing.py', relative, f'file://{config}', 'http://127.0.0.1/a.py')):
        event, data = public.run(name, '', file_data(uploaded))
        assert event == 'error' and data['error'] == f'Value: {name} is not in the list of choices: {list_models()}'
        with pytest.raises(app.gr.Error, match='choose one of the list') as error:  # without the check of the dropdown
            app.run(name, '', uploaded, 0.3, public=True)
        assert error.value.message == f'{name}: no such config, choose one of the list'
    event, data = public.run([CLASSIFIER], '', file_data(uploaded))  # passes the check of the dropdown
    assert event == 'error' and data['error'] == f'{[CLASSIFIER]}: no such config, choose one of the list'
    assert not executed.exists()


@pytest.mark.slow
def test_public_page_refuses_other_checkpoints(app, public, folder, checkpoints, uploaded):
    """The answer is the same for files that exist and files that do not."""
    names = [
        folder / 'runs/a.pth',
        checkpoints / f'{CLASSIFIER}.pth',
        checkpoints / 'missing.pth',
        f'../{CLASSIFIER}.pth',
        '../missing.pth',
        'runs/../runs/a.pth',
        'link.pth',
        f'linked/{CLASSIFIER}.pth',
        'notes.txt',
        uploaded,
        'http://127.0.0.1/a.pth',
        'https://example.com/a.pth',
        f'file://{checkpoints}/{CLASSIFIER}.pth',
    ]
    choices = ['', 'broken.pth', 'inside.pth', 'replaced.pth', 'runs/a.pth']
    for name in map(str, names):
        event, data = public.run(CLASSIFIER, name, file_data(uploaded))
        assert event == 'error' and data['error'] == f'Value: {name} is not in the list of choices: {choices}'
        with pytest.raises(app.gr.Error) as error:  # without the check of the dropdown
            app.run(CLASSIFIER, name, uploaded, 0.3, folder=folder, public=True)
        assert error.value.message == f'{name}: no such checkpoint, choose one of the list'
    with pytest.raises(app.gr.Error, match='no such checkpoint'):
        app.run(CLASSIFIER, str(folder / 'runs/a.pth'), uploaded, 0.3, public=True)  # no folder, no checkpoints

    replaced = folder / 'replaced.pth'  # a file when the page was built
    replaced.unlink()
    replaced.symlink_to(checkpoints / f'{CLASSIFIER}.pth')
    for name in ('replaced.pth', ['runs/a.pth']):  # pass the check of the dropdown
        event, data = public.run(CLASSIFIER, name, file_data(uploaded))
        assert event == 'error' and data['error'] == f'{name}: no such checkpoint, choose one of the list'


@pytest.mark.slow
def test_public_page_fetches_no_address(public, uploaded):
    url = 'https://example.com/image.jpg'
    refused = f'{url}: addresses are not accepted, upload the image'
    # gradio downloads the address of a file in the value of any input.
    for image, score_thr in ((file_data(url), 0.3), (file_data(uploaded), file_data(url))):
        event, data = public.run(CLASSIFIER, '', image, score_thr)
        assert event == 'error' and data['error'] == refused
    for path in (f'/file={url}', f'/file/{url}', f'/proxy={url}', f'/file={url.replace(":", "%3A")}'):
        answer = public.http.get(path)
        assert (answer.status_code, answer.text) == (403, 'addresses are not accepted')


@pytest.mark.slow
def test_public_page_serves_no_other_file(public, folder, uploaded):
    root = Path(mmvitzoo.__file__).parents[1]
    config = next(root.glob(f'configs/*/{CLASSIFIER}.py'))
    files = ['/etc/passwd', root / 'configs', config, os.path.relpath(config), folder / 'runs/a.pth', '/missing']
    files += [f'{uploaded}/../../../../../../etc/passwd', 'file:///etc/passwd']
    for file in map(str, files):
        for route in ('/file=', '/file/'):
            assert public.http.get(route + quote(file, safe='')).status_code == 403, file
        event, data = public.run(CLASSIFIER, '', file_data(file))  # as the image
        assert event == 'error' and data['error'] is None, file
    assert str(folder) not in public.http.get('../config').text


@pytest.mark.slow
def test_public_page_limits_requests(app, public):
    content = b'0' * app.MAX_REQUEST
    multipart = {'Content-Type': 'multipart/form-data; boundary=x'}
    answers = [
        public.upload(content),  # with its header, the request is larger
        public.http.post('/upload', headers=multipart, content=iter([content])),  # chunked
        public.http.post('/call/run', json=dict(data=[CLASSIFIER, '', dict(url=f'data:,{content}'), 0.3])),
    ]
    assert [answer.status_code for answer in answers] == [413, 413, 413]
    assert public.http.post('/run-history/connect').status_code == 404


@pytest.mark.slow
def test_local_page_with_a_folder_of_checkpoints(app, folder, checkpoints, image, monkeypatch):
    monkeypatch.setattr(app, 'TIMING_SECONDS', 0)
    config = next(Path(mmvitzoo.__file__).parents[1].glob(f'configs/*/{CLASSIFIER}.py'))
    assert '1.2 M parameters' in app.run(str(config), 'runs/a.pth', str(image), 0.3, folder=folder)[2]
    with pytest.raises(app.gr.Error, match=f'{CLASSIFIER}.pth: no such checkpoint, choose one of the list'):
        app.run(CLASSIFIER, str(checkpoints / f'{CLASSIFIER}.pth'), str(image), 0.3, folder=folder)


def test_gradio_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    monkeypatch.delitem(sys.modules, 'mmvitzoo.app', raising=False)
    with pytest.raises(ImportError, match='the web page requires gradio: pip install -r requirements/app.txt'):
        import_module('mmvitzoo.app')
