"""Does BigMac pay? One layer, its rivals and whole models, on the fabrics that one machine can offer.

**Arms.** ``fine_grained`` (CDAC, the baseline) and ``bigmac`` (DCCA), each with every dispatcher: one copy per expert
(``all_to_all``), one copy per rank (``per_rank``), everything to everyone (``all_gather``); ``local`` on one rank. One copy per
expert flatters BigMac, so every row of its has two ratios: over the baseline with one copy per expert, and over the baseline's
*best* dispatcher. Rivals are DeepSpeed's MoE layer and the grouped experts of transformers behind its own all-to-all, with
the same router weights, experts and tokens. The baseline has to be no slower than the best of them. Where layers are *captured*,
both sides have ``static_gather`` besides (``local`` on one rank), launched piece by piece and replayed from a CUDA graph.

**Fabrics.** Two GPUs of one machine can talk over NVLink, through shared memory (``NCCL_P2P_DISABLE=1``) or through sockets
(``NCCL_SHM_DISABLE=1`` too); each is a fresh set of processes, since NCCL reads its environment once. What NCCL then said it
uses is in the rows (``transports``). ``none`` is one rank without communication; ``gloo`` are ranks on the processor, a rehearsal.

**Routing.** A router must choose what the benchmark wants without being touched, so that rivals' routers can be steered alike:
the first features of a token *are* its logits, and the router's matrix picks them out. ``balanced`` cuts random permutations
of the experts into sets, so that each expert gets exactly the same number of tokens and every set is equally likely.
``trained_like`` draws sets without replacement from a Zipf popularity (exponent 0.5, experts in random order, seeded): a skew
of the kind that a balance loss leaves, **not** the routing of a trained model. Rows have the load that came of it.

**Correct first.** In float64 every arm must equal one rank with all experts and all tokens, to 1e-12: outputs, gradients of
inputs and of experts. At the real shape and dtype, outputs and input gradients of some of each rank's tokens are held against
float64 by the package's error budget. An arm that fails is a row with the reason and is not timed.

**Timing.** Arms take turns, round after round. A turn starts with all ranks together, runs the arm once untimed and then some
times in a row, as layers of a model do; a sample is the slowest rank's. Rounds are as many as the time budget of a
case allows, up to 24 samples. Stages come from a pass of their own, with a clock that the timed passes do not have; peak
memory is what a pass allocates on top of weights and inputs.

Run it from the root of the repository::

    python -m benchmarks.moe run --plan quick --out rows.jsonl
    python -m benchmarks.moe summary rows.jsonl

Read in this order: ``cases`` (what is asked), ``inputs`` (routing), ``arms`` and ``rivals``, ``check``, ``turns`` (timing),
``layer``, ``captured``, ``collectives``, ``kernels``, ``model``, ``crew`` (what ranks share), ``launch`` (processes), ``run``, ``summary``.
"""
