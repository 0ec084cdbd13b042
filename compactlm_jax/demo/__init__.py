"""The README's main job: distil a real encoder on real text, and measure what was gained."""
