"""A package, so that its test files may have the names of those above; CuPy imports NVIDIA's packages of this name."""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
