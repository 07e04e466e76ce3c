"""The commands of `opacus-pil`: arguments in, words and an exit code out, one file each."""
