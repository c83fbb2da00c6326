"""Plan one attention call, carry it out, and see what it cost and how far it is from dense."""

import torch

from adamac.attention import AdaCluster, Tokens, attend

torch.manual_seed(0)
scenes = torch.randn(1, 4, 64, 64)  # 4 heads; tokens of 64 things, so that there is something to cluster
belongs = torch.arange(4096) // 64
query, key, value = (scenes[:, :, belongs] * 2 + torch.randn(1, 4, 4096, 64) for _ in range(3))

method = AdaCluster(budget=Tokens(0.15))
plan = method(query, key)
output = attend(query, key, value, plan)

dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
error = (output - dense).norm() / dense.norm()
print(f"{plan.density().mean():.1%} of the pairs, relative error {error:.1e}")
