"""The whole objective of a DiT once more, written straight down with other means, to judge the modules by.

No module, no forward-mode derivative: weights come as a dictionary, dF/ds by differentiating a gradient twice, patches
and heads by einsum and explicit loops.
"""

import math

import torch


def rms(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6) ** 0.5


def dense(w, name, x):
    return torch.einsum("...i,oi->...o", x, w[f"{name}.weight"]) + w[f"{name}.bias"]


def scalar(w, name, a):
    angles = a[:, None] * torch.tensor([10000 ** (-k / 128) for k in range(128)], dtype=a.dtype)
    h = dense(w, f"{name}.mlp.0", torch.cat([torch.cos(angles), torch.sin(angles)], 1))
    return dense(w, f"{name}.mlp.2", h * torch.sigmoid(h))


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(w, name, x, heads):
    d = x.shape[-1] // heads
    q, k, v = (dense(w, f"{name}.qkv", x)[..., i * heads * d : (i + 1) * heads * d] for i in range(3))
    out = []
    for h in range(heads):
        qh, kh, vh = (a[..., h * d : (h + 1) * d] for a in (q, k, v))
        qh, kh = rms(qh) * w[f"{name}.q_norm.weight"], rms(kh) * w[f"{name}.k_norm.weight"]
        p = torch.exp(torch.einsum("bnd,bmd->bnm", qh, kh) / math.sqrt(d))
        out.append(torch.einsum("bnm,bmd->bnd", p / p.sum(-1, keepdim=True), vh))
    return dense(w, f"{name}.proj", torch.cat(out, -1))


def network(w, x, t, s, label, beta, *, heads, depth, patch):
    """F of a DiT with the weights w."""
    width, side = w["pos_embed"].shape[-1], x.shape[-1] // patch
    c = scalar(w, "t_embedder", t) + scalar(w, "s_embedder", t - s) + scalar(w, "guidance_embedder", beta)
    c = c + w["y_embedder.embedding_table.weight"][label]
    c = c * torch.sigmoid(c)
    tokens = []
    for i in range(side):
        for j in range(side):
            piece = x[:, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            tokens.append(torch.einsum("bcpq,dcpq->bd", piece, w["x_embedder.proj.weight"]))
    h = torch.stack(tokens, 1) + w["x_embedder.proj.bias"] + w["pos_embed"]
    for i in range(depth):
        name = f"blocks.{i}"
        m = dense(w, f"{name}.adaLN_modulation.1", c)
        m = [rms(m[:, None, k * width : (k + 1) * width]) for k in range(6)]
        h = h + m[2] * attention(w, f"{name}.attn", rms(h) * (1 + m[1]) + m[0], heads)
        h = h + m[5] * dense(w, f"{name}.mlp.fc2", gelu(dense(w, f"{name}.mlp.fc1", rms(h) * (1 + m[4]) + m[3])))
    m = dense(w, "final_layer.adaLN_modulation.1", c)[:, None]
    out = dense(w, "final_layer.linear", rms(h) * (1 + rms(m[..., width:])) + rms(m[..., :width]))
    F = torch.zeros_like(x)
    for n in range(side * side):
        i, j = n // side * patch, n % side * patch
        F[:, :, i : i + patch, j : j + patch] = out[:, n].reshape(len(x), patch, patch, -1).permute(0, 3, 1, 2)
    return F


def derivative_in_s(function, s):
    """F(s) and dF/ds, with gradients: the gradient of s' vJp is linear in v, and its derivative in v is the JVP."""
    s = s.clone().requires_grad_()
    F = function(s)
    v = torch.zeros_like(F, requires_grad=True)
    (pulled,) = torch.autograd.grad(F, s, v, create_graph=True)
    (pushed,) = torch.autograd.grad(pulled, v, torch.ones_like(pulled), create_graph=True)
    return F, pushed


def losses(w, w_target, x0, x1, times, label, beta, *, null_label, scaled, **sizes):
    """Both terms of eq. 15 [B]."""
    t, s, s_prime = times
    wide = lambda a: a[:, None, None, None]  # noqa: E731
    g = 1 / beta if scaled else torch.ones_like(beta)
    none, one = torch.full_like(label, null_label), torch.ones_like(beta)

    x_t = wide(1 - t) * x0 + wide(t) * x1
    F, dF = derivative_in_s(lambda s: network(w, x_t, t, s, label, beta, **sizes), s)
    df = wide(g) * F + wide((s - t) * g) * dF
    with torch.no_grad():
        landing = x_t + wide((s - t) * g) * F
        u = wide(g) * network(w_target, landing, s, s, label, beta, **sizes)
    terminal = beta**2 * (df - u).pow(2).mean((1, 2, 3))

    x_s = wide(1 - s_prime) * x0 + wide(s_prime) * x1
    with torch.no_grad():
        free = network(w_target, x_s, s_prime, s_prime, none, one, **sizes)
    aim = wide(1 / beta) * (x1 - x0) + wide(1 - 1 / beta) * free
    velocity = wide(g) * network(w, x_s, s_prime, s_prime, label, beta, **sizes)
    return torch.where(t == s, 0.0, terminal), beta**2 * (velocity - aim).pow(2).mean((1, 2, 3))
