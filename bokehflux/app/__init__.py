"""What people type and watch: commands, progress, previews, sweeps, replay."""
