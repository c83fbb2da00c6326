"""Timing of single operations at the shapes of real models; the bake-off times whole videos."""
