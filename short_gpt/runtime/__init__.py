"""What every run needs: errors, progress bars, states on disk, digests, replicas, memory plans."""
