"""Networks: an image goes in, :class:`wsis.types.Maps` come out. No label enters, no loss leaves.

``backbones`` (:func:`create_backbone`), ``rtc`` (:class:`RTC`: backbone, CAM head, refinement,
decoder), ``convert`` (public checkpoints). Nothing is imported until it is asked for.
"""
