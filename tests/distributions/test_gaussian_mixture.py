import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax.distributions.gaussian_mixture import GaussianMixture, num_params
from dicode_jax.models.dicode import ar_losses

M, Z = 3, 5


def raw_params(shape=(2, 4), m=M, z=Z, seed=0):
    return jax.random.normal(jax.random.key(seed), (*shape, num_params(m, z)))


def test_one_component_is_a_plain_gaussian():
    raw = raw_params(m=1)
    x = jax.random.normal(jax.random.key(1), (2, 4, Z))
    mean, variance = raw[..., :Z], jax.nn.softplus(raw[..., Z : 2 * Z])
    want = jax.scipy.stats.norm.logpdf(x, mean, jnp.sqrt(variance)).sum(-1)
    got = GaussianMixture.from_params(raw, 1)
    np.testing.assert_allclose(got.log_prob(x), want, rtol=1e-5)
    np.testing.assert_allclose(got.nll(x), -want.mean() / Z, rtol=1e-5)
    np.testing.assert_allclose(got.expected_value(), mean, rtol=1e-6)


def test_density_integrates_to_one():
    mixture = GaussianMixture.from_params(raw_params(shape=(), m=3, z=1), 3)
    x = jnp.linspace(-12, 12, 20001)
    density = jnp.exp(jax.vmap(lambda x: mixture.log_prob(x[None]))(x))
    assert float(density.sum() * (x[1] - x[0])) == pytest.approx(1, abs=1e-3)  # less the tails


def test_packed_layout_is_means_then_variances_then_logits_component_first():
    raw = jnp.arange(num_params(M, Z), dtype=jnp.float32)
    mixture = GaussianMixture.from_params(raw, M)
    np.testing.assert_array_equal(mixture.mean, raw[: M * Z].reshape(M, Z))
    np.testing.assert_array_equal(mixture.logits, raw[2 * M * Z :])


def test_no_variance_gives_the_mean_of_the_component_exactly():
    mixture = GaussianMixture.from_params(raw_params(), M, var_scale=0)
    component = jnp.asarray([[0, 1, 2, 1], [2, 2, 0, 1]])
    noise = jax.random.normal(jax.random.key(1), (2, 4, Z))
    got = mixture.sample_with(component, noise)
    want = np.take_along_axis(np.asarray(mixture.mean), component[..., None, None], axis=2)
    np.testing.assert_array_equal(got, want[:, :, 0])


def test_scale_comes_after_the_floor_of_the_variance():
    raw = jnp.full((num_params(1, Z),), -50.0)
    floor = GaussianMixture.from_params(raw, 1).variance
    np.testing.assert_allclose(floor, 1e-5)
    np.testing.assert_allclose(GaussianMixture.from_params(raw, 1, var_scale=0.5).variance, 5e-6)


def test_uniform_numbers_pick_components_by_cumulated_weight():
    logits = jnp.log(jnp.asarray([0.2, 0.5, 0.3]))
    mixture = GaussianMixture(mean=jnp.zeros((3, 1)), variance=jnp.ones((3, 1)), logits=logits)
    got = [int(mixture.component_of(jnp.asarray(u))) for u in (0.0, 0.19, 0.21, 0.69, 0.71, 1.0)]
    assert got == [0, 0, 1, 1, 2, 2]


def test_samples_have_the_moments_of_the_mixture():
    mixture = GaussianMixture.from_params(raw_params(shape=(), z=2), M)
    keys = jax.random.split(jax.random.key(5), 20000)
    samples = jax.vmap(mixture.sample)(keys)
    mean = mixture.expected_value()
    second = jnp.einsum("m,mz->z", mixture.weights, mixture.variance + mixture.mean**2)
    for draws, wanted in ((samples, mean), (samples**2, second)):  # within four standard errors
        np.testing.assert_allclose(draws.mean(0), wanted, atol=4 * draws.std() / 20000**0.5)


def test_low_temperature_chooses_the_heaviest_component():
    raw = raw_params()
    cold = GaussianMixture.from_params(raw, M, var_scale=0, logits_temperature=1e-4)
    best = np.asarray(GaussianMixture.from_params(raw, M).logits).argmax(-1)
    want = np.take_along_axis(np.asarray(cold.mean), best[..., None, None], axis=2)[:, :, 0]
    np.testing.assert_array_equal(cold.sample(jax.random.key(3)), want)


def test_extreme_parameters_give_finite_values_and_gradients():
    variances = jnp.asarray([-120.0, -11.6, 0.0, 0.0, 88.0, 110.0])
    raw = jnp.zeros((1, num_params(2, 3))).at[0, 6:12].set(variances).at[0, 12].set(1000.0)

    def nll(raw, x):
        return GaussianMixture.from_params(raw, 2).nll(x)

    for x in ([0.0, 0.0, 4.0], [40.0, 40.0, 40.0]):
        value, grad = jax.value_and_grad(nll)(raw, jnp.asarray([x]))
        assert np.isfinite(value)
        assert np.isfinite(grad).all()
        assert not grad[0, 6:8].any()  # below the floor nothing pulls the variance
    assert jax.grad(nll)(raw, jnp.asarray([[0.0, 0.0, 4.0]]))[0, 8] != 0


def test_half_precision_parameters_are_evaluated_in_float32():
    raw = raw_params().astype(jnp.bfloat16)
    mixture = GaussianMixture.from_params(raw, M)
    assert mixture.log_prob(jnp.zeros((2, 4, Z), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_mixtures": 4}, "33 numbers are no parameters of 4 Gaussians"),
        ({"num_mixtures": 3, "var_scale": -1.0}, "var_scale"),
        ({"num_mixtures": 3, "logits_temperature": 0.0}, "logits_temperature"),
    ],
)
def test_wrong_options_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture.from_params(jnp.zeros((num_params(M, Z),)), **kwargs)


# Losses of the language model that are built on it.


def batch(k=3):
    keys = jax.random.split(jax.random.key(0), 2)
    return tuple(jax.random.normal(key, (2, k, 4, Z)) for key in keys)


@pytest.mark.parametrize("name", ar_losses.VECTOR_LOSSES)
def test_masked_keyframes_do_not_count(name):
    pred, target = batch()
    mask = jnp.asarray([[True, True, False], [True, False, False]])
    got = ar_losses.vector_loss(name, pred, target, mask)
    kept = [np.concatenate([x[0, :2], x[1, :1]])[None] for x in (pred, target)]
    want = ar_losses.vector_loss(name, *map(jnp.asarray, kept))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    changed = ar_losses.vector_loss(name, pred.at[1, 1].set(9.0), target, mask)
    np.testing.assert_allclose(changed, got, rtol=1e-6)


def test_vector_losses_are_distances():
    pred, target = batch()
    loss = {n: float(ar_losses.vector_loss(n, pred, target)) for n in ar_losses.VECTOR_LOSSES}
    assert loss["l1"] == pytest.approx(np.abs(pred - target).mean(), rel=1e-6)
    assert loss["mse"] == pytest.approx(np.square(pred - target).mean(), rel=1e-6)
    assert float(ar_losses.vector_loss("cosine", 3 * pred, pred)) == pytest.approx(0, abs=1e-6)


def test_unknown_names_raise():
    pred, target = batch()
    with pytest.raises(ValueError, match="unknown vector loss 'huber'"):
        ar_losses.vector_loss("huber", pred, target)


def test_balanced_loss_weighs_samples_not_keyframes():
    target = jax.random.normal(jax.random.key(0), (2, 3, 4, Z))
    raw = raw_params(shape=(2, 3, 4))
    mask = jnp.asarray([[True, True, True], [True, False, False]])
    got = ar_losses.mixture_loss(raw, target, mask, num_mixtures=M, balance=True)
    one = [
        ar_losses.mixture_loss(raw[i : i + 1], target[i : i + 1], mask[i : i + 1], num_mixtures=M)
        for i in range(2)
    ]
    np.testing.assert_allclose(got, (one[0] + one[1]) / 2, rtol=1e-5)
