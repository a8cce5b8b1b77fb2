"""Layouts as geometry: gauge, principal axes, alignment, neighbourhoods."""

from .gauge import gauge_fix, leading_components, principal_plane, svd_flip

__all__ = ["gauge_fix", "leading_components", "principal_plane", "svd_flip"]
