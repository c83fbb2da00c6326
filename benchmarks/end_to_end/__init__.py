"""How much faster does a denoising step get, with everything that is not attention included?

The transformers are diffusers' own classes at their published size, in diffusers' own pipelines with the published scheduler,
prompts given as embeddings and videos left as latents: what is timed is the denoising loop alone, a step at a time. The
weights are **random**, and every row says so. Time does not depend on what dense attention or a budget in tokens reads, so
those arms are timed as they would be on trained weights. It does depend on it where a rule looks at the content:

- a top-p budget (SVG2) reads more of random attention than of trained attention, which is concentrated. ``svg2`` is
  therefore slower here than its authors report; ``svg2_30`` has its clusters and reads the 25 to 30 % that they report.
- outlier stages (AdaCluster) find the cluster counts of random keys; the paper's rule may leave layers dense, or not, where
  it would decide otherwise on trained weights. The row has the reasons of all dense calls.

How it is measured. A *turn* is a call of the pipeline with the whole schedule of its scheduler, interrupted after the steps
that are wanted, as diffusers documents. Arms take turns, round after round, so that a drifting clock falls on all alike.
Before an arm's first turn its kernels are compiled and tuned by a run on a transformer of one layer at the same shapes, which
is not counted. A step lasts from the end of the step before to its own end, taken from events on the device, without a
wait between steps of one kind. There are three kinds: ``dense`` (by schedule, or because the arm is dense), ``first_sparse``
(the step that clusters from scratch, once a video) and ``sparse`` (all later ones). The time of a whole video is *projected*
from the medians for the number of steps of each kind that its full schedule has, 10 % dense.

Run it from the root of the repository, and read the rows as a table::

    python -m benchmarks.end_to_end run --models wan-1.3b --arms stock best_dense default_15 --out rows.jsonl
    python -m benchmarks.end_to_end summary rows.jsonl

Several GPUs for each video, of which every arm's efficiency is read beside the rows of one GPU in the same file (``summary``
adds that table). ``check`` says beforehand whether spread videos are what they should be::

    torchrun --standalone --nproc-per-node 2 -m benchmarks.end_to_end check
    torchrun --standalone --nproc-per-node 2 -m benchmarks.end_to_end run --models wan-14b --out rows.jsonl

Every finished turn is in the file at once; the time limit (``--minutes``) and Ctrl-C lose the turn in progress at most.
``--tiny`` runs the same code on small models of the same classes, which a processor does in seconds.

Read in this order: ``models`` (facts), ``arms``, ``build`` (pipelines with random weights), ``turn`` (what is timed),
``rows``, ``ranks`` and ``check`` (several GPUs), ``run`` (the loop), ``summary``, ``scaling``.
"""
