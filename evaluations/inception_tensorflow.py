"""The same Inception graph run by TensorFlow itself: the reference that the PyTorch network is tested against."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor

from evaluations.features import check_pictures
from evaluations.graph_file import GraphFileError
from evaluations.inception import CLASSIFIER, INPUT, POOL, SPATIAL, SPATIAL_CHANNELS
from evaluations.inception_weights import identify


class TensorFlowInception:
    """Pictures to features like `evaluations.inception.Inception`, computed by TensorFlow, softmax included.

    Features come back on `device`. With "cpu" TensorFlow is kept off GPUs as well.

    Raises:
        ValueError: when TensorFlow is not installed, or refuses the graph.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        weights = identify(path)
        self.device = torch.device(device)
        self.comparable = weights.published
        tf = _tensorflow()
        gpus = tf.config.list_physical_devices("GPU") if self.device.type == "cuda" else []
        tf.config.set_visible_devices(gpus[self.device.index or 0 :][:1], "GPU")  # the one of this process
        self.label = f"{weights.name}, tensorflow {tf.__version__}"
        with tf.Graph().as_default() as graph:
            self._pictures = tf.compat.v1.placeholder(tf.uint8, [None, None, None, 3])
            self._outputs = _outputs(tf, path, tf.cast(self._pictures, tf.float32))
        threads = torch.get_num_threads()
        config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=threads, inter_op_parallelism_threads=threads)
        config.gpu_options.allow_growth = True  # PyTorch wants some of it too
        self._session = tf.compat.v1.Session(graph=graph, config=config)

    def __call__(self, pictures: Tensor) -> dict[str, Tensor]:
        check_pictures(pictures)
        found = self._session.run(self._outputs, {self._pictures: pictures.cpu().numpy()})
        return {name: torch.from_numpy(value).to(self.device) for name, value in found.items()}


def _tensorflow():
    if importlib.util.find_spec("tensorflow") is None:
        raise ValueError("--backend tensorflow needs a package that is not installed: pip install tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # its start-up notes
    import tensorflow  # takes 20 seconds, and few commands get here

    return tensorflow


def _outputs(tf, path: str | Path, images) -> dict:
    """The tensors of the graph that the metrics are made of, under the names of a FeatureNetwork."""
    definition = tf.compat.v1.GraphDef()
    try:
        definition.ParseFromString(Path(path).read_bytes())
        names = [f"{POOL}:0", f"{SPATIAL}:0", CLASSIFIER]
        pool, spatial, classifier = tf.import_graph_def(
            definition, input_map={f"{INPUT}:0": images}, return_elements=names
        )
    except Exception as error:  # each kind of damage has an exception of its own
        raise GraphFileError(f"TensorFlow does not accept the graph {path}: {error}") from error
    pool = tf.reshape(pool, [-1, pool.shape[-1]])
    spatial = spatial[..., :SPATIAL_CHANNELS]
    return {
        "pool": pool,
        "spatial": tf.reshape(spatial, [-1, spatial.shape[1] * spatial.shape[2] * SPATIAL_CHANNELS]),
        "probabilities": tf.nn.softmax(tf.matmul(pool, classifier.inputs[1])),
    }
