"""`vlft doctor`: what would go wrong, before the hours are spent. See docs/doctor.md.

findings    grades, the verdict
versions    one table of versions that are known to be slow or broken
machine     GPUs, kernels, memory, disk
collective  an all-reduce over all GPUs, in processes of its own
model       the model's folder
records     the data, as training would read it
contents    what is in a sample of it: pictures, boxes, texts
pictures    perceptual hashes and near duplicates
languages   which scripts and languages
page        doctor.html
examine     all of them, in order
"""
