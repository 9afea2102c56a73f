# %% [markdown]
# # 00 Basics: arrays, gradients, and one step of backpropagation by hand
#
# Costs: CPU seconds; v5e-1 not measured.

# %%
from gptjax import show

show.curves({"a": ([1, 2], [3, 4])})

# %% [markdown]
# ## Exercises
