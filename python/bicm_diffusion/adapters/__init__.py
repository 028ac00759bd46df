"""Drop-in forms for other libraries: diffusers, k-diffusion, EDM and OpenAI's consistency models.

Each library's module is imported on its own, so that none of them is needed by another:
`from bicm_diffusion.adapters.diffusers import accelerate_scheduler`.
"""
