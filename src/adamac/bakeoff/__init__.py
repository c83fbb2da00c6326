"""What is measured: the same videos made by several arms, and a report that says what was gained and what it cost.

An *arm* is a way to compute attention. Every arm makes the video of every *case*, a prompt with a seed, from the same
noise, in interleaved order, so that a slow minute of the machine falls on all of them. Each finished video is a *row*;
the *summary* and the *report* are drawn from rows alone and can be drawn again without a model.

Read in this order: ``config`` (what is asked), ``arms``, ``run`` (the loop), ``generate`` (one video, timed), ``rows``,
``metrics``, ``summary``, ``report``.
"""
