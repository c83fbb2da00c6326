"""What the page of GPU results says about its tables: what fell short, and why. Part of `gpu_page.py`.

Figures that are typed here and not drawn from rows stand beside the table that has them; go over them when rows are new.
"""

CARDS = (
    "An H200 is an H100 with more and faster memory: dense attention takes as long on both (flash-attn-4 at Wan2.1-14B: 162 and "
    "163 ms). The targets were set for an H100; where both have run, both are here."
)

TARGETS = (
    "Every target of a step is met with compiled blocks, of HunyuanVideo's 129 frames without too; those of a single call are "
    "missed by 11 to 37 %. *Blocks compiled* is compiled sparse over compiled dense, and over stock diffusers as it comes, which "
    "is not compiled; Wan2.1 and 129 frames of it ran on an H100, CogVideoX-2B and 193 frames on an H200. *About*: over a stock "
    "step from another machine of the kind.\n\n"
    "No tail is missed any more. At commit a47cf41 one of fifteen compiled steps of CogVideoX-2B took 871 ms instead of 319, and "
    "one of twenty at Wan2.1-1.3B 980 instead of 724: Python's garbage collector. What was taken down of every call had grown by "
    "hundreds of objects a step, and a full collection looks at all objects there are. It is a handful a step since b477957, and "
    "the slowest of forty steps of either density takes 1 % longer than the median (c6f9614); of twenty steps of each large model "
    "the slowest takes 0.1 to 0.2 % longer ([below](#denoising-steps)). Where sparse attention cannot win "
    "calls stay dense ([below](#from-how-much-work-on-sparse-attention-pays))."
)

RIVALS = (
    "The same without compensation (of which the paper has none), and other people's kernels over random blocks of 128 × 128 of "
    "the same density, the kernel alone, nothing planned (over the limit where dense, which takes long, ran at a lower rate than "
    "a short call):"
)

KEYS = (
    "Half as many key clusters again (six times the root of the tokens instead of four) err 19 to 26 % less on the embedded "
    "model ([results](results.md)). They cost 5 to 15 % of a call:"
)

OTHER_DENSITIES = "Other densities, in later runs; at CogVideoX-2B's length 30 % is as slow as dense:"

CALLS = (
    "From 75,000 tokens on 81 to 88 % of a call are the attention kernel, at three quarters of flash-attn-4's rate. Its rate "
    "counts rows that somebody asked for: with root-N query clusters the last tile of each is part empty, and it computes 12 % "
    "more rows than there are at Wan2.1-14B, 9 % at HunyuanVideo's 129 frames, 17 % at Wan2.1-1.3B and 25 % at CogVideoX-2B "
    "(counted on tensors drawn alike, `cpu/row_waste.jsonl`), and it reads a mean for every cluster that is skipped, 1 to 2 % of "
    "the keys. **Could the targets be met?** At flash-attn-4's own rate and with no row wasted the kernel would take 26 of its "
    "36 ms at Wan2.1-14B, 15 %, and the call 35 ms: 4.7×, for a target of 4.5×. So it would take both, and neither is in sight: "
    "gathered rows cannot be fetched as cheaply as consecutive ones, and tiles of fewer rows use the matrix units less. "
    "Planning by logits takes 6.5 ms there (by tokens, on the H100, 5.5). Blocks of tokens sorted by cluster, for "
    "flash-attn-4's block-sparse kernel, would not help: for the same error they have to read 1.6 times as much "
    "([log](log.md)). What does help is to ask for less: by logits 8 % errs less than 15 % did before ([results](results.md))."
)

LIMITS = (
    "So lists and traffic are worth 7 % of the kernel at most, less than the rows that tiles waste. Fetching by TMA would save "
    "instructions of the fetching warps besides, which was not measured; but Hopper's cannot gather rows, so each cluster's run "
    "would have to be fetched in boxes with ragged ends. It is not worth building before the rest."
)

STEPS = (
    "What is not attention (linear layers; norms, rotary embeddings and modulation, which run eagerly here) is 48 to 76 % of a "
    "sparse step of ours and as long as in a dense one. Compiling takes 1.4 s of 11.4 off a step of Wan2.1-14B, dense or sparse, "
    "0.24 s of 1.17 at Wan2.1-1.3B, 1.8 s of 20.4 at HunyuanVideo's 129 frames and 3 s of 41 at 193, so a sparse step gains "
    "most.\n\n"
    "SVG2 keeps clusters until they hold 0.9 of the softmax's mass by its estimate. On random weights, whose attention is "
    "nearly flat, that is 87 % of the pairs, so it cannot win there: these rows say what its clustering costs (fifty iterations "
    "in the first sparse step, which takes 6.7 s longer than the next at 129 frames), not what it does on trained weights. *paper* is AdaCluster's own "
    "settings, without compensation, at a density of 25 to 26 %. At 193 frames SVG2's first sparse step takes 55.3 s, of which "
    "10.4 s are planning, and the next 45.6 s, where a dense step of the same run takes 41.9 s: one step of each."
)

TAILS = (
    "Percentiles of the large models' steps, by twenty of them in a row at 15 %, compiled, each on a card of its own while the "
    "others of the machine were at work too:"
)

VIDEO = (
    "What that makes of a video's denoising by the default schedule (50 steps, the first tenth dense), reckoned from these steps; "
    "text encoder and autoencoder are not in it:"
)

SCALING_BEFORE = (
    "HunyuanVideo and Wan2.1-14B on one GPU and spread over two and four of one host (NVLink), by diffusers' Ulysses parallelism: "
    "every rank has all tokens of its share of the heads. Nothing compiled, three or four sparse steps, one dense one; random weights. "
    "*Efficiency* is the time on one GPU over as many times the time on several. Before it was timed, small models of all three "
    "families with heads and tokens that do not divide made the same sparse video on two GPUs and on four as on one (float32, NCCL: "
    "latents differ by 7e-8 to 3e-6, those of Wan2.1 on four by 2e-4; sparse and dense differ by 1e-3 to 6e-3). Steps on two GPUs were timed while the other two of "
    "the machine were at work too, those on four alone."
)

SCALING = (
    "On four GPUs a step is 3.7 to 3.8 times as fast dense and 3.6 times sparse, so that sparse on four is 6.6 (Wan2.1-14B) and 8.5 times "
    "(129 frames) as fast as dense on one. Attention itself scales, dense (2.0 and 4.1 times as fast on two and four) and sparse "
    "(2.0 and 3.9); the ranks differ by 2 % at most. What does not is the rest: exchanging heads for tokens adds 6 to 8 ms a layer on "
    "two GPUs and 3.4 to 5.6 ms on four, 0.24 to 0.42 s and 0.16 to 0.33 s of a step. A sparse step is shorter, so the same exchange is more of it: "
    "3 and 4 % less efficient than a dense one at Wan2.1-14B on two and four GPUs, 4 and 5.1 % at 129 frames, where 5 % was the target: "
    "met but for 129 frames on four, where 0.1 % is missing; on two GPUs sparse over dense differs by 0.4 % between this run and the one "
    "before (c6f9614, `h200/scaling_second_run.jsonl`). In the first run (b477957, `h200/scaling_first_run.jsonl`) the exchange added "
    "12 to 18 ms a layer, and sparse was 5 and 7 % less efficient on two: it passed seven times over memory to bring heads and "
    "tokens in order, and passes once before each message now. What it sends at Wan2.1-14B (774 MB a rank and layer on two GPUs, 581 "
    "on four) would take 3 and 2 ms at 275 GB/s, which is what an exchange between two of these cards reaches (`h200/moe.jsonl`), so "
    "the next to gain is to send while other heads are planned. Runs on eight GPUs have not been made."
)

CHECKS = (
    "compute-sanitizer (memcheck) found nothing in either attention kernel or in planning at odd shapes (1 to 700 tokens, empty "
    "clusters, padding, text) on an H100 before clusters went by logits, nor, on an H200 at 319cbe1, in the attention kernels as they are and in whole "
    "sparse steps planned by logits, with padding and text, in a CUDA graph, and without room for the plan (16 tests; each tensor an "
    "allocation of its own but for the last two, since a graph and a full card need PyTorch's cache). "
    "The GPU tests of ops and sparse steps on an H200 at 52194b2, eight at a time: 690, of which 583 passed and 107 were skipped "
    "(what a processor alone runs, or a kernel that was not installed). Those of the diffusers seam and of bake-offs at 9116826: 465 passed, two were skipped "
    "and three failed, mended since: two took for granted that there is no GPU, one had found ranks that waited for one which failed to load (`h200/gpu_tests.jsonl`). "
    "Every kernel that was timed had been held to its reference by itself before."
)

CROSSOVER = (
    "Calls one after another without a pause, ten in a row: whichever is slower, the device or the host; dense by flash-attn-4 "
    "on an H200. `enable` keeps calls below 3 TFLOP dense and says so (`adamac.attention.crossover`). Over cuDNN and on another "
    "host the two met at 2 TFLOP (`h100/crossover.jsonl`)."
)
