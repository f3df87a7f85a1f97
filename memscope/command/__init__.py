"""What every command has, memscope's own and those of targets: options, exit codes, files, progress."""
