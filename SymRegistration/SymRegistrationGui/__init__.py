"""The parts of the SymRegistration module of 3D Slicer.

Everything that computes lives in SymRegistrationLib and runs in a process of its own; this package holds what needs
MRML and Qt. It imports only the torch-free bottom of the library (job, geometry).
"""
