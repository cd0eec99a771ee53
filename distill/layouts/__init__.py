"""The layouts there are. Of several that fit the first is taken."""

from distill.layouts import big_vision, huggingface, internvit, siglip, timm_eva, timm_vit
from distill.layouts.tables import Layout

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        huggingface.VIT,
        huggingface.DINOV2,
        huggingface.DINOV3,
        siglip.FIXED,
        siglip.NAFLEX,
        internvit.TRANSFORMERS,
        internvit.OWN,
        timm_vit.PARALLEL,
        timm_vit.VIT,
        timm_eva.EVA,
        big_vision.BIG_VISION,
    )
}
