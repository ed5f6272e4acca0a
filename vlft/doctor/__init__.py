"""`vlft doctor`: what would go wrong, before the hours are spent. See docs/doctor.md.

findings    grades, the verdict
versions    one table of versions that are known to be slow or broken
machine     GPUs, kernels, memory, disk
collective  an all-reduce over all GPUs, in processes of its own
model       the model's folder
records     the data, as training would read it
contents    what is in one of its samples: pictures, boxes, texts
looked      the samples that are looked into
sampled     what these say
copies      the same picture twice, on both sides or on one
shots       thumbnails
pictures    perceptual hashes and near duplicates
languages   which scripts and languages
page        doctor.html
examine     all of them, in order
"""
