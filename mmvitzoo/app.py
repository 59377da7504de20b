"""A web page to try models: python -m mmvitzoo.app.

Pick a config and a checkpoint, drop an image, and see boxes, masks or maps, what the backbone makes of the
image, and what the model costs. Needs Python 3.10 and `pip install -r requirements/app.txt`.
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
    raise ImportError('the page needs gradio: pip install -r requirements/app.txt') from None

ALL = 'all'
ENOUGH_SECONDS = 3  # of repeated predictions, for the latency
LONGEST_SIDE = 640  # of the image that the backbone's features are shown of, in pixels


def build_app() -> gr.Blocks:
    """The page, to be launched."""
    with gr.Blocks(title='MMViTZoo', analytics_enabled=False) as app:
        gr.Markdown('# MMViTZoo\nWhat a model of the zoo sees in your image.')
        with gr.Row():
            with gr.Column(scale=1):
                with gr.Row():
                    family = gr.Dropdown([ALL, *FAMILIES], value=ALL, label='Family')
                    task = gr.Dropdown([ALL, *TASKS], value=ALL, label='Task')
                config = gr.Dropdown(list_models(), value=None, label='Config, or its path', allow_custom_value=True)
                checkpoint = gr.Textbox(
                    label='Checkpoint',
                    info="Path or address of a training's or the authors' file; empty: random weights",
                )
                score_thr = gr.Slider(0, 1, value=0.3, step=0.05, label='Least score of a detection')
                image = gr.Image(type='filepath', sources=['upload', 'clipboard'], label='Image', height=280)
                button = gr.Button('Run', variant='primary')
            with gr.Column(scale=2):
                picture = gr.Image(label='Prediction', interactive=False)
                found = gr.Dataframe(label='Found', interactive=False)
                cost = gr.Markdown()
        features = gr.Plot(label='Features of the backbone', show_label=False)
        for choice in (family, task):
            choice.change(choices, [family, task], config)
        button.click(run, [config, checkpoint, image, score_thr], [picture, found, cost, features])
    return app


def choices(family: str, task: str) -> Dict[str, Any]:
    """The configs of a family and a task."""
    return gr.update(choices=list_models(*(None if x == ALL else x for x in (family, task))), value=None)


def run(
    config: Optional[str], checkpoint: str, image: Optional[str], score_thr: float
) -> Tuple[np.ndarray, Dict[str, List[Any]], str, Figure]:
    """What the button does: the picture, a table of what was found, the costs, the features."""
    if not config:
        raise gr.Error('choose a config first', duration=None, print_exception=False)
    if not image:
        raise gr.Error('drop an image first', duration=None, print_exception=False)
    checkpoint = checkpoint.strip()
    try:
        predictor = load(config, checkpoint)
        predictor.score_thr = score_thr
        prediction, seconds = timed(predictor, image)
        notes = [] if checkpoint else ['**The weights are random**: no checkpoint was given.']
        notes += [cost_of(config), f'Latency: {1000 * seconds:.0f} ms, from this file to its predictions.']
        return prediction.picture, table(prediction), '\n\n'.join(notes), features(predictor, image)
    except (ValueError, FileNotFoundError) as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error


@lru_cache(maxsize=1)
def load(config: str, checkpoint: str) -> Predictor:
    """The model, kept until another one is asked for."""
    return Predictor(config, checkpoint or None)


def timed(predictor: Predictor, image: str) -> Tuple[Prediction, float]:
    """A prediction, and the seconds that it takes: the median of those after the first one, if that was quick."""
    times: List[float] = []
    while not times or sum(times) < ENOUGH_SECONDS:
        start = time.perf_counter()
        prediction = predictor(image)
        times.append(time.perf_counter() - start)
    return prediction, median(times[1:] or times)


@lru_cache(maxsize=None)
def cost_of(config: str) -> str:
    """Parameters and FLOPs of a config's model, in a line."""
    try:
        cost = measure(get_config(config))
    except NotImplementedError as error:
        return f'FLOPs: not counted, {error}.'
    return (
        f'{cost.params / 1e6:.1f} M parameters; {cost.flops / 1e9:.1f} GFLOPs '
        f'for an image of {cost.shape[0]} x {cost.shape[1]} pixels.'
    )


def table(prediction: Prediction) -> Dict[str, List[Any]]:
    """A row for each thing that was found, without its mask."""
    (found,) = prediction.result.values()
    headers = [key for key in found[0] if key != 'mask'] if found else ['nothing found']
    return dict(headers=headers, data=[[rounded(item[key]) for key in headers] for item in found])


def rounded(value: Any) -> Any:
    """For a reader: scores to a thousandth, boxes to a pixel."""
    if isinstance(value, list):
        return ', '.join(f'{x:.0f}' for x in value)
    return round(value, 3) if isinstance(value, float) else value


def features(predictor: Predictor, path: str) -> Figure:
    """The maps of the backbone."""
    image = read_image(path)
    if max(image.shape) > LONGEST_SIDE:
        image = mmcv.imrescale(image, (LONGEST_SIDE, LONGEST_SIDE))
    inputs = normalize(image, predictor.model.cfg.model.data_preprocessor)
    return draw_features(image, feature_maps(predictor.model, inputs.to(next(predictor.model.parameters()).device)))


def main() -> None:
    """Serves the page."""
    parser = argparse.ArgumentParser(prog='python -m mmvitzoo.app', description=__doc__.splitlines()[0])
    parser.add_argument('--host', default='127.0.0.1', help='0.0.0.0 lets other machines in, who may read its files')
    parser.add_argument('--port', type=int, default=7860)
    args = parser.parse_args()
    build_app().launch(server_name=args.host, server_port=args.port)


if __name__ == '__main__':
    main()
