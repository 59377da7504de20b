"""Web page for trying models on your images: python -m mmvitzoo.app.

The page takes a config, a checkpoint and an image. It shows the prediction, the feature maps of the backbone, and the
parameters, FLOPs and latency of the model. Requires Python >= 3.10 and `pip install -r requirements/app.txt`.

On this machine the page accepts any config and checkpoint. A config is Python code that is executed. A page for other
machines (`--host`) therefore accepts only the configs of the zoo, the checkpoints of one folder (`--checkpoints`) and
uploaded images.
"""

import argparse
import time
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any, Dict, List, Optional, Tuple

import mmcv
import numpy as np
from matplotlib.figure import Figure

from .analysis.cost import measure
from .analysis.features import draw_features, feature_maps
from .analysis.images import normalize
from .images import read_image
from .inference import Prediction, Predictor
from .zoo import FAMILIES, TASKS, get_config, list_models

try:
    import gradio as gr
    from gradio import processing_utils
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse
except ImportError:
    raise ImportError('the web page requires gradio: pip install -r requirements/app.txt') from None

ALL = 'all'
TIMING_SECONDS = 3  # total time of the predictions from which the latency is measured
MAX_FEATURE_SIZE = 640  # longest side in pixels of the image for the feature maps
LOOPBACK = ('127.0.0.1', 'localhost', '::1')
MAX_REQUEST = 20 * 2**20  # size in bytes of an upload or another request from other machines
CHECKPOINT_SUFFIXES = ('.pth', '.pt', '.bin', '.safetensors', '.pkl')


def build_app(checkpoints: Optional[Path] = None, public: bool = False) -> gr.Blocks:
    """Builds the page.

    Args:
        checkpoints: Folder whose files are the only checkpoints to choose from. None allows any path and URL, or no
            checkpoint if ``public``.
        public: Accepts only names from :func:`mmvitzoo.list_models` as configs, and no checkpoint outside the folder.
    """
    folder = checkpoints and checkpoints.resolve()
    with gr.Blocks(title='MMViTZoo', analytics_enabled=False) as app:
        gr.Markdown('# MMViTZoo\nRun a model of the zoo on your image.')
        with gr.Row():
            with gr.Column(scale=1):
                with gr.Row():
                    family = gr.Dropdown([ALL, *FAMILIES], value=ALL, label='Family')
                    task = gr.Dropdown([ALL, *TASKS], value=ALL, label='Task')
                label = 'Config name' if public else 'Config name or path'
                config = gr.Dropdown(list_models(), value=None, label=label, allow_custom_value=not public)
                if public or folder:
                    choices = [('none (random weights)', ''), *((x, x) for x in list_checkpoints(folder))]
                    checkpoint = gr.Dropdown(choices, value='', label='Checkpoint')
                else:
                    checkpoint = gr.Textbox(
                        label='Checkpoint',
                        info='Path or URL of a checkpoint; leave empty for random weights',
                    )
                score_thr = gr.Slider(0, 1, value=0.3, step=0.05, label='Score threshold')
                image = gr.Image(type='filepath', sources=['upload', 'clipboard'], label='Image', height=280)
                button = gr.Button('Run', variant='primary')
            with gr.Column(scale=2):
                picture = gr.Image(label='Prediction', interactive=False)
                objects = gr.Dataframe(label='Objects or classes', interactive=False)
                cost = gr.Markdown()
        features = gr.Plot(label='Feature maps of the backbone', show_label=False)
        for filter_by in (family, task):
            filter_by.change(filter_configs, [family, task], config)
        button.click(
            partial(run, folder=folder, public=public),
            [config, checkpoint, image, score_thr],
            [picture, objects, cost, features],
            api_name='run',
        )
    return app


def filter_configs(family: str, task: str) -> Dict[str, Any]:
    """Lists the configs of a family and a task in the dropdown."""
    return gr.update(choices=list_models(*(None if x == ALL else x for x in (family, task))), value=None)


def list_checkpoints(folder: Optional[Path]) -> List[str]:
    """Lists the checkpoint files below a folder by their relative paths, without symlinks that leave the folder."""
    files = [path for path in folder.rglob('*') if path.suffix in CHECKPOINT_SUFFIXES] if folder else []
    return sorted(str(x.relative_to(folder)) for x in files if x.is_file() and folder in x.resolve().parents)


def run(
    config: Optional[str],
    checkpoint: Optional[str],
    image: Optional[str],
    score_thr: float,
    folder: Optional[Path] = None,
    public: bool = False,
) -> Tuple[np.ndarray, Dict[str, List[Any]], str, Figure]:
    """Returns the drawn prediction, its table, the costs and the feature maps for the inputs of the page.

    ``folder`` and ``public`` restrict the inputs as in :func:`build_app`.
    """
    if not config:
        raise page_error('choose a config first')
    if not image:
        raise page_error('upload an image first')
    checkpoint = checkpoint or ''
    # A request can hold values that are not in the lists of the page.
    if public and config not in list_models():
        raise page_error(f'{config}: no such config, choose one of the list')
    if checkpoint and (public or folder) and checkpoint not in list_checkpoints(folder):
        raise page_error(f'{checkpoint}: no such checkpoint, choose one of the list')
    path = str(folder / checkpoint) if checkpoint and folder else checkpoint.strip()
    try:
        predictor = load(config, path)
        predictor.score_thr = score_thr
        prediction, seconds = predict_timed(predictor, image)
        notes = [] if path else ['**The weights are random**: no checkpoint was given.']
        notes += [cost_of(config), f'Latency: {1000 * seconds:.0f} ms, including reading and drawing the image.']
        return prediction.picture, table(prediction), '\n\n'.join(notes), features(predictor, image)
    except (ValueError, FileNotFoundError) as error:
        message = str(error).replace(path, checkpoint) if path else str(error)  # hides where the folder is
        raise page_error(message) from error


def page_error(message: str) -> gr.Error:
    """Returns an error that the page shows until it is closed."""
    return gr.Error(message, duration=None, print_exception=False)


@lru_cache(maxsize=1)
def load(config: str, checkpoint: str) -> Predictor:
    """Loads a model; the last one is cached."""
    return Predictor(config, checkpoint or None)


def predict_timed(predictor: Predictor, image: str) -> Tuple[Prediction, float]:
    """Predicts repeatedly for ``TIMING_SECONDS``; returns the prediction and the median seconds without warm-up."""
    times: List[float] = []
    while not times or sum(times) < TIMING_SECONDS:
        start = time.perf_counter()
        prediction = predictor(image)
        times.append(time.perf_counter() - start)
    return prediction, median(times[1:] or times)


@lru_cache(maxsize=None)
def cost_of(config: str) -> str:
    """Formats the parameters and FLOPs of a config's model as one line."""
    try:
        cost = measure(get_config(config))
    except NotImplementedError as error:
        return f'FLOPs: not available, {error}.'
    return (
        f'{cost.params / 1e6:.1f} M parameters; {cost.flops / 1e9:.1f} GFLOPs '
        f'for an image of {cost.shape[0]} x {cost.shape[1]} pixels.'
    )


def table(prediction: Prediction) -> Dict[str, List[Any]]:
    """Lists detected objects or classes in the rows of a table, without masks."""
    (rows,) = prediction.result.values()
    headers = [key for key in rows[0] if key != 'mask'] if rows else ['no detections']
    return dict(headers=headers, data=[[format_value(row[key]) for key in headers] for row in rows])


def format_value(value: Any) -> Any:
    """Rounds scores to three digits and boxes to whole pixels."""
    if isinstance(value, list):
        return ', '.join(f'{x:.0f}' for x in value)
    return round(value, 3) if isinstance(value, float) else value


def features(predictor: Predictor, path: str) -> Figure:
    """Draws the feature maps of the backbone."""
    image = read_image(path)
    if max(image.shape) > MAX_FEATURE_SIZE:
        image = mmcv.imrescale(image, (MAX_FEATURE_SIZE, MAX_FEATURE_SIZE))
    inputs = normalize(image, predictor.model.cfg.model.data_preprocessor)
    return draw_features(image, feature_maps(predictor.model, inputs.to(next(predictor.model.parameters()).device)))


class RequestFilter:
    """Middleware that refuses large requests and the route by which gradio fetches an address for the browser.

    gradio's ``max_file_size`` limits each file of an upload, not the images that other requests can hold.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Dict[str, Any], receive: Any, send: Any) -> None:
        respond = self.app
        if scope['type'] == 'http':
            headers = dict(scope['headers'])
            if '://' in scope['path']:
                respond = PlainTextResponse('addresses are not accepted', 403)
            # Browsers state the size of each request. A chunked request has none.
            elif b'transfer-encoding' in headers or int(headers.get(b'content-length', 0)) > MAX_REQUEST:
                respond = PlainTextResponse(f'a request must state its size, at most {MAX_REQUEST} bytes', 413)
        await respond(scope, receive, send)


async def refuse_address(url: str, cache_dir: str) -> str:
    """Replaces gradio's download of an address that a request gives instead of an uploaded file."""
    raise page_error(f'{url}: addresses are not accepted, upload the image')


def serve(host: str, port: Optional[int] = None, checkpoints: Optional[Path] = None, **options: Any) -> Any:
    """Serves the page, with restrictions unless ``host`` is a loopback address.

    Args:
        host: Address to listen on.
        port: Port to listen on. None selects a free one.
        checkpoints: Folder of checkpoints, see :func:`build_app`.
        options: Further arguments of gradio's ``launch``.

    Returns:
        The result of gradio's ``launch``.
    """
    public = host not in LOOPBACK
    if public:
        processing_utils.async_ssrf_protected_download = refuse_address
        # The history of gradio would let visitors connect this server to the Hugging Face Hub.
        options.update(
            max_file_size=MAX_REQUEST, run_history=False, app_kwargs=dict(middleware=[Middleware(RequestFilter)])
        )
    # A share link is a tunnel that lets other machines reach a page without restrictions.
    return build_app(checkpoints, public).launch(server_name=host, server_port=port, share=False, **options)


def main() -> None:
    """Parses the command line and serves the page."""
    parser = argparse.ArgumentParser(prog='python -m mmvitzoo.app', description=__doc__.splitlines()[0])
    parser.add_argument(
        '--host',
        default='127.0.0.1',
        help='address to listen on (default: %(default)s); with 0.0.0.0, other machines can use the configs of the zoo '
        'and the checkpoints of --checkpoints',
    )
    parser.add_argument('--port', type=int, default=7860, help='port to listen on (default: %(default)s)')
    parser.add_argument(
        '--checkpoints',
        type=Path,
        help='folder whose checkpoints are listed on the page; other checkpoints are then refused',
    )
    args = parser.parse_args()
    if args.checkpoints and not args.checkpoints.is_dir():
        parser.error(f'--checkpoints must be a folder, got {args.checkpoints}')
    serve(args.host, args.port, args.checkpoints)


if __name__ == '__main__':
    main()
