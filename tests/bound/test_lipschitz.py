import torch

from tvm_ref.bound.lipschitz import exact_norms, jacobian_norms, largest_on_segments, power_iteration_norms


def test_norm_of_a_matrix_in_the_plane_and_above():
    for dim, norms in ((1, exact_norms), (2, exact_norms), (2, power_iteration_norms), (6, power_iteration_norms)):
        matrix = torch.randn(dim, dim, dtype=torch.float64)
        found = norms(lambda x, matrix=matrix: x @ matrix.T, torch.randn(7, dim, dtype=torch.float64))
        expected = torch.linalg.matrix_norm(matrix, 2).expand(7)
        torch.testing.assert_close(found, expected, rtol=1e-3 if norms is power_iteration_norms else 1e-12, atol=0)
        assert (found <= expected * (1 + 1e-12)).all()


def test_norm_of_a_field_whose_jacobian_changes_from_point_to_point():
    """u = (sin x, x y): J = [[cos x, 0], [y, x]], of norm sqrt((q + sqrt(q^2 - 4 det(J)^2)) / 2), q = ||J||_F^2."""
    x, y = torch.randn(2, 50, dtype=torch.float64)
    q, determinant = x.cos() ** 2 + y**2 + x**2, x * x.cos()
    norm = ((q + (q**2 - 4 * determinant**2).sqrt()) / 2).sqrt()
    found = jacobian_norms(lambda z: torch.stack([z[:, 0].sin(), z.prod(1)], -1), torch.stack([x, y], -1))
    torch.testing.assert_close(found, norm)


def test_images_use_power_iteration_and_a_constant_field_has_norm_zero():
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(jacobian_norms(lambda x: -3 * x, x), torch.full((3,), 3.0, dtype=torch.float64))
    assert torch.equal(jacobian_norms(lambda x: 0 * x + 1, x), torch.zeros(3, dtype=torch.float64))


def test_segments_are_looked_at_between_their_ends():
    x = torch.tensor([[-1.0]], dtype=torch.float64)

    def field(x):
        return x.tanh()  # steepest at 0

    assert largest_on_segments(field, x, -x) == 1
