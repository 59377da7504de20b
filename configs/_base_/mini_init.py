# Initial weights for training without pretraining: smaller random convolutions than the authors' learn faster.
mini_init_cfg = dict(
    type='Kaiming',
    layer=['Conv2d', 'Linear'],
    a=5**0.5,
    distribution='uniform',
    mode='fan_in',
    nonlinearity='leaky_relu',
)
