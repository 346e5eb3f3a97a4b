"""From files to features: video frames, the frozen CLIP towers, and the caption repository."""
