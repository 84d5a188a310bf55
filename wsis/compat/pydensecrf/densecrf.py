"""``DenseCRF`` and ``DenseCRF2D`` as ``pydensecrf.densecrf`` has them.

The model and its inference: Krahenbuhl and Koltun, Efficient Inference in Fully Connected CRFs with
Gaussian Edge Potentials, NeurIPS 2011. ``Q_0 = softmax(-U)``, then ``Q = softmax(-U - sum_k
compat_k(K_k Q))``, where a number w as ``compat`` means ``-w Q`` (Potts).

Sizes: ``L`` labels, ``N`` points (pixels, row by row), ``D`` features, ``H W`` image.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from wsis import _lattice
from wsis.compat.pydensecrf import arguments
from wsis.compat.pydensecrf.eigen import MatrixXf, as_array
from wsis.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    # Of a normalization and a number of threads: a lattice, and factors before and after it.
    Basis = Callable[[str, int], tuple[_lattice.Lattice, Any, Any]]


class KernelType(IntEnum):
    """Which parameters of a kernel learning may change; inference does not depend on it."""

    CONST_KERNEL = 0
    DIAG_KERNEL = 1
    FULL_KERNEL = 2


class NormalizationType(IntEnum):
    """How a kernel K is normalised by the sums of its rows, D."""

    NO_NORMALIZATION = 0  # K
    NORMALIZE_BEFORE = 1  # K D^-1
    NORMALIZE_AFTER = 2  # D^-1 K
    NORMALIZE_SYMMETRIC = 3  # D^-1/2 K D^-1/2


CONST_KERNEL, DIAG_KERNEL, FULL_KERNEL = KernelType
NO_NORMALIZATION, NORMALIZE_BEFORE, NORMALIZE_AFTER, NORMALIZE_SYMMETRIC = NormalizationType
_NORMALIZATIONS = ("none", "before", "after", "symmetric")  # the lattice's words, in this order


def _empty(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    return np.empty(shape, dtype)


def _normalised(build: Callable[[int], _lattice.Lattice]) -> Basis:
    def basis(normalization: str, threads: int) -> tuple[_lattice.Lattice, Any, Any]:
        lattice = build(threads)
        return lattice, *_lattice.normalisers(lattice, normalization, _empty, threads=threads)

    return basis


class Unary:
    """What :meth:`DenseCRF.setUnary` takes."""

    _energies: NDArray[np.float32]


class ConstUnary(Unary):
    """Energies as they are.

    Args:
        u: ``[L, N] float32``, C-contiguous.

    Raises:
        ValueError: another dtype, rank or memory order.
    """

    def __init__(self, u: NDArray[np.float32]) -> None:
        self._energies = arguments.array("u", u, 2)


class LogisticUnary(Unary):
    """Energies of a linear model: ``L f``.

    Args:
        L: ``[L, F] float32``, weights of every label.
        f: ``[F, N] float32``, features of every point.

    Raises:
        ValueError: another dtype, rank or memory order, or shapes that do not fit each other.
    """

    def __init__(self, L: NDArray[np.float32], f: NDArray[np.float32]) -> None:
        weights, features = arguments.array("L", L, 2), arguments.array("f", f, 2)
        if weights.shape[1] != features.shape[0]:
            raise InputError(
                f"L must be [L, F] and f [F, N], got {list(weights.shape)} and "
                f"{list(features.shape)}"
            )
        self._energies = weights @ features


class DenseCRF:
    """A fully connected CRF over any points.

    One object is used by one thread at a time; several objects run side by side. On an image all
    cores work that torch or ``OMP_NUM_THREADS`` grant; in a worker process of multiprocessing, one.

    Args:
        nvar: N.
        nlabels: L.

    Raises:
        InputError: a negative N, or no label.

    Example:
        >>> crf = DenseCRF(4, 2)
        >>> crf.setUnaryEnergy(np.array([[0, 0, 1, 1], [1, 1, 0, 0]], np.float32))
        >>> crf.addPairwiseEnergy(np.array([[0, 0.1, 0.2, 9]], np.float32), compat=3)
        >>> np.argmax(crf.inference(5), axis=0)
        array([0, 0, 0, 1])
    """

    _size: tuple[int, int] | None = None  # H, W where points are pixels

    def __new__(cls, nvar: int, nlabels: int, *_: Any, **__: Any) -> DenseCRF:
        """In ``__new__``: a subclass whose ``__init__`` does not call ours works there too."""
        self = super().__new__(cls)
        self._start(arguments.integer(nvar), arguments.integer(nlabels))
        return self

    def _start(self, points: int, labels: int) -> None:
        if points < 0 or labels < 1:
            raise InputError(
                f"nvar must be 0 or more and nlabels at least 1, got {points} and {labels}"
            )
        self._points, self._labels = points, labels
        self._unary: NDArray[np.float32] | None = None
        self._terms: list[_lattice.Term] = []

    def setUnaryEnergy(self, u: NDArray[np.float32]) -> None:
        """Sets the energies of every label at every point.

        Args:
            u: ``[L, N] float32``, C-contiguous. Kept, not copied: do not change it before the
                inference.

        Raises:
            ValueError: another shape, dtype or memory order.
        """
        self._set(arguments.array("u", u, 2))

    def setUnary(self, u: Unary) -> None:
        """Sets the energies from a :class:`ConstUnary` or :class:`LogisticUnary`."""
        if not isinstance(u, (ConstUnary, LogisticUnary)):
            raise TypeError(
                f"Argument 'u' has incorrect type (expected {Unary.__module__}.Unary, "
                f"got {type(u).__name__})"
            )
        self._set(u._energies)

    def _set(self, energies: NDArray[np.float32]) -> None:
        needed = (self._labels, self._points)
        if energies.shape != needed:
            raise InputError(
                f"Bad shape for unary energy (Need {needed}, got {tuple(energies.shape)})"
            )
        self._unary = energies

    def addPairwiseEnergy(
        self,
        features: NDArray[np.float32],
        compat: Any,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Adds a term that joins points whose features are near each other.

        Args:
            features: ``[D, N] float32``, C-contiguous, each row divided by its width.
            compat: a number w (Potts: labels that differ cost w), ``[L] float32`` (diagonal) or
                ``[L, L] float32`` (matrix, of which the symmetric part counts).
            kernel: of no effect on inference.
            normalization: of the kernel.

        Raises:
            ValueError: another shape, dtype or memory order, features that are not finite or
                reach too far, or a compatibility that does not fit.
        """
        features = arguments.array("features", features, 2)
        if features.shape[1] != self._points:
            raise InputError(
                f"Bad shape for pairwise energy (Need (?, {self._points}), "
                f"got {tuple(features.shape)})"
            )
        self._add(
            _normalised(
                lambda threads: _lattice.build(
                    features[None], np.empty, size=self._size, threads=threads
                )
            ),
            compat,
            kernel,
            normalization,
        )

    def _add(
        self,
        basis: Basis,
        compat: Any,
        kernel: int,
        normalization: int,
    ) -> None:
        """Checks everything before the lattice is built, which is the costly part."""
        arguments.member(KernelType, "kernel", kernel)
        norm = _NORMALIZATIONS[arguments.member(NormalizationType, "normalization", normalization)]
        mix = arguments.compatibility(compat, self._labels)
        if self._points == 0:
            return
        threads = arguments.threads()
        mix = _lattice.mix_of(mix, self._labels)
        self._terms.append(_lattice.Term(*basis(norm, threads), mix))

    def inference(self, niter: int, /) -> MatrixXf:
        """Probabilities after so many iterations: ``[L, N] float32``, as a buffer."""
        return MatrixXf(self._run(max(arguments.integer(niter), 0)))

    def startInference(self) -> tuple[MatrixXf, MatrixXf, MatrixXf]:
        """``Q`` after no iteration, and two matrices that :meth:`stepInference` wants to see."""
        empty = np.empty((0, 0), np.float32)
        return MatrixXf(self._run(0)), MatrixXf(empty), MatrixXf(empty)

    def stepInference(self, Q: MatrixXf, tmp1: MatrixXf, tmp2: MatrixXf, /) -> None:
        """One iteration, in place in ``Q``; the other two are not needed here."""
        q = self._current(Q)
        q[...] = self._run(1, start=q)

    def klDivergence(self, Q: MatrixXf, /) -> float:
        """The KL divergence of Q from the model, up to a constant.

        ``sum Q log Q + sum U Q + sum_k sum Q compat_k(K_k Q)``: the pairwise part is counted fully,
        as pydensecrf does, not halved.
        """
        q = self._current(Q)
        total = float(np.sum(q * np.log(np.maximum(q, 1e-20)), dtype=np.float64))
        total += float(np.sum(q * self._energies(), dtype=np.float64))
        for term in self._terms:
            sums = _lattice.filter(
                term.lattice,
                q[None],
                np.empty,
                before=term.before,
                after=term.after,
                threads=arguments.threads(),
            )[0]
            mix = np.asarray(term.mix, np.float32)
            if mix.size == self._labels:
                sums *= mix[:, None]
            else:
                sums = mix.reshape(self._labels, self._labels) @ sums
            # The lattice adds to the logits, so its signs are turned round.
            total -= float(np.sum(q * sums, dtype=np.float64))
        return total

    def _current(self, matrix: MatrixXf) -> NDArray[np.float32]:
        if not isinstance(matrix, MatrixXf):
            raise TypeError(
                f"Argument 'Q' has incorrect type (expected {MatrixXf.__module__}.MatrixXf, "
                f"got {type(matrix).__name__})"
            )
        q = as_array(matrix)
        if q.shape != (self._labels, self._points):
            raise InputError(
                f"Q must be what startInference returned, {(self._labels, self._points)}, "
                f"got {q.shape}"
            )
        return q

    def _energies(self) -> NDArray[np.float32]:
        if self._unary is None:
            return np.zeros((self._labels, self._points), np.float32)
        return self._unary

    def _run(
        self, iterations: int, start: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        energies = self._energies()
        if self._points == 0:
            return energies.copy()
        probs, _ = _lattice.mean_field(
            energies[None],
            self._terms,
            iterations,
            np.empty,
            start=None if start is None else start[None],
            threads=arguments.threads(),
        )
        return probs[0]


class DenseCRF2D(DenseCRF):
    """A fully connected CRF over the pixels of an image.

    Args:
        w: W; the width comes first.
        h: H.
        nlabels: L.

    Raises:
        InputError: a negative size, or no label.

    Example:
        >>> crf = DenseCRF2D(3, 2, 2)  # 3 wide, 2 high
        >>> crf.setUnaryEnergy(np.zeros((2, 6), np.float32))
        >>> crf.addPairwiseGaussian(sxy=3, compat=3)
        >>> np.array(crf.inference(5)).reshape(2, 2, 3).shape
        (2, 2, 3)
    """

    _size: tuple[int, int]

    def __new__(cls, w: int, h: int, nlabels: int, *_: Any, **__: Any) -> DenseCRF2D:
        """See :class:`DenseCRF`."""
        width, height = arguments.integer(w), arguments.integer(h)
        if width < 0 or height < 0:
            raise InputError(f"w and h must be 0 or more, got {width} and {height}")
        self = object.__new__(cls)
        self._start(width * height, arguments.integer(nlabels))
        self._size = (height, width)
        return self

    def addPairwiseGaussian(
        self,
        sxy: float | Sequence[float],
        compat: Any,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Adds a term that joins near pixels.

        Args:
            sxy: width in pixels, > 0; or one along x and one along y.
            compat: as for :meth:`addPairwiseEnergy`.
            kernel: of no effect on inference.
            normalization: of the kernel.

        Raises:
            ValueError: a width that is not positive, or a compatibility that does not fit.
        """
        sx, sy = arguments.widths("sxy", sxy, 2)
        self._add(
            lambda norm, threads: _lattice.places(self._size, (sx, sy), norm, _empty, threads),
            compat,
            kernel,
            normalization,
        )

    def addPairwiseBilateral(
        self,
        sxy: float | Sequence[float],
        srgb: float | Sequence[float],
        rgbim: NDArray[np.uint8],
        compat: Any,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Adds a term that joins near pixels of like colour.

        Args:
            sxy: width in pixels, > 0; or one along x and one along y.
            srgb: width in units of the image's values, > 0; or one for each channel.
            rgbim: ``[H, W, 3] uint8``, C-contiguous.
            compat: as for :meth:`addPairwiseEnergy`.
            kernel: of no effect on inference.
            normalization: of the kernel.

        Raises:
            ValueError: another shape, dtype or memory order, a width that is not positive, or a
                compatibility that does not fit.
        """
        image = arguments.array("rgbim", rgbim, 3, np.uint8)
        if image.shape[2] != 3:
            raise InputError(
                "addPairwiseBilateral only works for RGB images. For other types, use "
                "`utils.create_pairwise_bilateral` to construct your own pairwise energy and add "
                f"it through `addPairwiseEnergy` (got {tuple(image.shape)})."
            )
        if image.shape[:2] != self._size:
            raise InputError(
                f"Bad shape for pairwise bilateral (Need {(*self._size, 3)}, "
                f"got {tuple(image.shape)})"
            )
        (sx, sy), channels = arguments.widths("sxy", sxy, 2), arguments.widths("srgb", srgb, 3)
        self._add(
            _normalised(
                lambda threads: _lattice.build_image(
                    self._size,
                    np.empty,
                    spatial=(sx, sy),
                    image=image[None],
                    channels_last=True,
                    widths=channels,
                    threads=threads,
                )
            ),
            compat,
            kernel,
            normalization,
        )
