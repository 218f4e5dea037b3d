"""A reference interpreter of Core ML programs: runs a saved `.mlpackage` on any system.

It reads what is on the disk and knows nothing of how it was made, so that it can judge an
export; and it makes pictures where Core ML itself is missing, slowly. Its modules need torch and
coremltools: import them inside functions.
"""
