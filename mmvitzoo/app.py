"""Web page for trying models on your images: python -m mmvitzoo.app.

The page takes a config, a checkpoint and an image. It shows the prediction, the feature maps of the backbone, and the
parameters, FLOPs and latency of the model. Requires Python >= 3.10 and `pip install -r requirements/app.txt`.
"""

import argparse
import time
from functools import lru_cache
from statistics import median
from typing import Any, Dict, List, Optional, Tuple

import mmcv
import numpy as np
from matplotlib.figure import Figure

from .analysis.cost import measure
from .analysis.features import draw_features, feature_maps
from .analysis.images import normalize
from .inference import Prediction, Predictor, read_image
from .zoo import FAMILIES, TASKS, get_config, list_models

try:
    import gradio as gr
except ImportError:
    raise ImportError('the web page requires gradio: pip install -r requirements/app.txt') from None

ALL = 'all'
TIMING_SECONDS = 3  # total time of the predictions from which the latency is measured
MAX_FEATURE_SIZE = 640  # longest side in pixels of the image for the feature maps


def build_app() -> gr.Blocks:
    """Builds the page."""
    with gr.Blocks(title='MMViTZoo', analytics_enabled=False) as app:
        gr.Markdown('# MMViTZoo\nRun a model of the zoo on your image.')
        with gr.Row():
            with gr.Column(scale=1):
                with gr.Row():
                    family = gr.Dropdown([ALL, *FAMILIES], value=ALL, label='Family')
                    task = gr.Dropdown([ALL, *TASKS], value=ALL, label='Task')
                config = gr.Dropdown(list_models(), value=None, label='Config name or path', allow_custom_value=True)
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
        button.click(run, [config, checkpoint, image, score_thr], [picture, objects, cost, features])
    return app


def filter_configs(family: str, task: str) -> Dict[str, Any]:
    """Lists the configs of a family and a task in the dropdown."""
    return gr.update(choices=list_models(*(None if x == ALL else x for x in (family, task))), value=None)


def run(
    config: Optional[str], checkpoint: str, image: Optional[str], score_thr: float
) -> Tuple[np.ndarray, Dict[str, List[Any]], str, Figure]:
    """Returns the drawn prediction, its table, the costs and the feature maps for the inputs of the page."""
    if not config:
        raise gr.Error('choose a config first', duration=None, print_exception=False)
    if not image:
        raise gr.Error('upload an image first', duration=None, print_exception=False)
    checkpoint = checkpoint.strip()
    try:
        predictor = load(config, checkpoint)
        predictor.score_thr = score_thr
        prediction, seconds = predict_timed(predictor, image)
        notes = [] if checkpoint else ['**The weights are random**: no checkpoint was given.']
        notes += [cost_of(config), f'Latency: {1000 * seconds:.0f} ms, including reading and drawing the image.']
        return prediction.picture, table(prediction), '\n\n'.join(notes), features(predictor, image)
    except (ValueError, FileNotFoundError) as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error


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


def main() -> None:
    """Serves the page."""
    parser = argparse.ArgumentParser(prog='python -m mmvitzoo.app', description=__doc__.splitlines()[0])
    parser.add_argument(
        '--host', default='127.0.0.1', help='address to listen on; 0.0.0.0 lets other machines read files of this one'
    )
    parser.add_argument('--port', type=int, default=7860, help='port to listen on (default: %(default)s)')
    args = parser.parse_args()
    build_app().launch(server_name=args.host, server_port=args.port)


if __name__ == '__main__':
    main()
