"""How far apart two sets of pictures are, under a name that says in which feature space.

Only the features of the published Inception weights give an FID. Every other network's distances are called KD- and
FD- with the name of the network, so that nobody compares them with published numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from evaluations.features import FeatureNetwork, PictureStatistics, feature_statistics, frechet, rank_share
from evaluations.metrics import kernel_distance

# Numbers of pictures -> those pictures, uint8 (n, H, W, 3).
Pictures = Callable[[list[int]], Tensor]


def distance_names(seen: FeatureNetwork | PictureStatistics) -> tuple[str, str]:
    """What the kernel and the Frechet distance between a network's features are called.

    KID and FID for the published Inception weights, else KD- and FD- with the first word of the label.
    """
    if seen.comparable:
        return "KID", "FID"
    name = seen.label.split()[0].rstrip(",:")
    return f"KD-{name}", f"FD-{name}"


def distances(reference: PictureStatistics, samples: PictureStatistics, seed: int = 0) -> dict[str, float]:
    """Kernel and Frechet distance of two sets of pictures whose features were kept, under their proper names.

    The kernel distance is 0 on average for two samples of one distribution, however small they are, and may come out
    below 0. The Frechet distance is not: read it beside that of two sets of real pictures of the same sizes.
    `seed` draws the kernel distance's subsets; its standard deviation over them is there as ``... std``.
    """
    kernel, frechet_name = distance_names(reference)
    if reference.features is None or samples.features is None:
        raise ValueError("a kernel distance needs the features themselves: gather them with keep_features=True")
    mean, deviation = kernel_distance(reference.features, samples.features, seed=seed)
    return {kernel: mean, f"{kernel} std": deviation, frechet_name: frechet(reference, samples)}


def numbered_statistics(
    network: FeatureNetwork, pictures: Pictures, count: int, batch_size: int = 32
) -> PictureStatistics:
    """Statistics and features of pictures 0 to `count` - 1, each made by one of the processes; all get the result."""
    share = rank_share(count)
    return feature_statistics(network, _batches(pictures, share, batch_size), first=share.start, keep_features=True)


def _batches(pictures: Pictures, numbers: range, batch_size: int) -> Iterator[Tensor]:
    for first in range(0, len(numbers), batch_size):
        yield pictures(list(numbers[first : first + batch_size]))


class DistanceMonitor:
    """The distance of a model's pictures to real ones, measured again and again while the model is trained.

    `draw` makes picture i in the same way each time (from its seed, or from the held-out image i), so that what
    changes from one call to the next is the model alone. Each process draws its share. Features of the `real` pictures
    are taken at the first call.
    """

    def __init__(
        self, network: FeatureNetwork, real: Pictures, real_count: int, draw: Pictures, count: int, batch_size: int = 32
    ) -> None:
        self.network, self.draw, self.count, self.batch_size = network, draw, count, batch_size
        self._real, self._real_count = real, real_count
        self._reference: PictureStatistics | None = None

    def __call__(self) -> dict[str, float]:
        """The numbers of `distances`, for the model as it is now."""
        if self._reference is None:
            self._reference = numbered_statistics(self.network, self._real, self._real_count, self.batch_size)
        return distances(self._reference, numbered_statistics(self.network, self.draw, self.count, self.batch_size))
