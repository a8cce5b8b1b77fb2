"""Layouts as geometry: gauge, alignment, principal axes, neighbourhoods."""

from .gauge import gauge_fix, leading_components, principal_plane

__all__ = ["gauge_fix", "leading_components", "principal_plane"]
