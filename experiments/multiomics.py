"""draft"""
from collections.abc import Callable
import flax.linen as nn, jax, jax.numpy as jnp, optax, numpy as np
from experiments.train import *
class OmicsEncoder(nn.Module):
    """MM-Dynamics encoder: x ⊙ σ(W x) → Linear → ReLU → dropout."""
    hidden: int
    dropout: float
    @nn.compact
    def __call__(self, x, train):
        gate = nn.sigmoid(nn.Dense(x.shape[-1], name="gate")(x))
        h = nn.relu(nn.Dense(self.hidden, name="hidden")(x * gate))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        return h, gate
class OmicsModel(nn.Module):
    fusion: nn.Module
    hidden: int
    classes: int
    dropout: float = 0.5
    @nn.compact
    def __call__(self, inputs, train=False):
        feats, extras = {}, {}
        for name, x in inputs.items():
            h, gate = OmicsEncoder(self.hidden, self.dropout, name=f"encode_{name}")(x, train)
            conf = nn.Dense(1, bias_init=nn.initializers.constant(1 / self.classes), name=f"confidence_{name}")(h)
            logit = nn.Dense(self.classes, name=f"classify_{name}")(h)
            extras[name] = (gate, conf[:, 0], logit)
            feats[name] = h * conf
        out = self.fusion(feats, train=train)
        return Prediction(nn.Dense(self.classes, name="head")(out.fused), out, extras)
def loss(pred, labels):
    ce = optax.softmax_cross_entropy_with_integer_labels
    total = ce(pred.logits, labels).mean()
    for gate, conf, logit in pred.extras.values():
        p = jax.nn.softmax(logit)[jnp.arange(len(labels)), labels]
        total = total + gate.mean() + jnp.mean((conf - p) ** 2) + ce(logit, labels).mean()
    return total
