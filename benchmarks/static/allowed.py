"""The exceptions to the gates, with their reasons. An entry that a whole run does not need any more fails it."""

from .gates import NARROW, SCALAR, SERIALIZED, SPILL, Allowed

# (Triton, architecture, kernel, case) of kernels that keep a few bytes, 40 at most, outside their main loops.
_SPILLS = (
    ("3.6.0", "sm_8[09]", "gemm_kernel load_normalised *", "block B/16 bf16, float32 stream, scaled"),
    ("3.6.0", "sm_89", "gemm_kernel load_normalised *", "block B/16 fp32"),
    ("3.6.0", "sm_120", "gemm_kernel load_scaled * store_activation_gradient", "block B/16 fp16, scaled"),
    ("3.6.0", "sm_8[09]", "gemm_kernel load_matrix load_matrix store_derivative", "whole block * bf16*"),
    ("3.6.0", "sm_120", "gemm_kernel load_matrix load_matrix store_derivative", "whole block S/16 bf16"),
    ("3.6.0", "sm_80", "apply_kernel load_matrix store_gated", "whole block g/14 bf16, gated"),
    ("3.6.0", "sm_120", "gemm_kernel load_matrix load_patches store", "patch embedding B/32 *"),
    ("3.6.0", "gfx942", "gemm_kernel load_matrix load_normalised store", "block B/16 bf16, float32 stream, scaled"),
    (
        "3.9.0",
        "sm_80",
        "gemm_kernel load_scaled * store_activation_gradient",
        "block B/16 bf16, float32 stream, scaled",
    ),
    ("3.9.0", "sm_80", "gemm_kernel load_matrix load_patches store", "patch embedding L/14 fp16"),
    ("3.9.0", "sm_80", "attention_backward_dkdv_kernel", "attention d=64 fp32"),
    ("3.9.0", "sm_89", "apply_kernel load_matrix store_folded", "whole block B/16 fp32"),
    ("3.9.0", "sm_80", "attention_backward_dkdv_kernel", "attention d=128 fp32"),
    ("3.9.0", "sm_120", "gemm_kernel load_matrix load_patches store", "patch embedding B/32 *"),
)

ALLOWED: tuple[Allowed, ...] = (
    Allowed(
        SCALAR,
        "With 197 tokens a row of the bias starts at an odd address, and nothing wider than one element can be loaded. "
        "The key padding mask is one byte a key.",
        kernel="attention_*",
        case="attention * masked",
    ),
    Allowed(
        SCALAR,
        "The right operand's rows are tokens here: each thread holds a few columns of many tokens, and reads the "
        "statistics or the drop path's scale of each token by themselves.",
        kernel="gemm_kernel load_matrix load_[ns]* store",
    ),
    Allowed(
        SCALAR,
        "A row of 14 pixels is 28 bytes long, 14 in uint8, and starts at multiples of 4, or 2, where nothing wider can "
        "be loaded: two pixels a load.",
        kernel="gemm_kernel *load_patches*",
        case="patch embedding L/14 *",
    ),
    Allowed(
        NARROW,
        "A weight's row of 588 elements is no multiple of 16, which is all that Triton is told of. This is as much as "
        "the weight, once.",
        kernel="sections_kernel unfold_pixels",
        case="patch embedding L/14 *",
    ),
    Allowed(
        SCALAR,
        "On this architecture each thread normalises parts of eight rows, and reads the mean and rstd of each row by "
        "themselves.",
        arch="sm_100",
        triton="3.6.0",
        kernel="gemm_kernel load_normalised load_matrix *",
    ),
    Allowed(
        SCALAR,
        "Tiles of full-precision float32 are so small that two wide loads a thread fetch both: a few statistics or "
        "scales outnumber them.",
        arch="gfx942",
        case="* fp32",
    ),
    Allowed(
        SERIALIZED,
        "For float16 (bfloat16 is not) every tile that was tried is serialized but two: one of 32 columns, which loads "
        "twice as much for each product, and 64x128 with four warps, which spills 436 bytes.",
        arch="sm_90",
        triton="3.6.0",
        kernel="gemm_kernel load_scaled load_matrix store_activation_gradient",
        case="block B/16 fp16, scaled",
    ),
    *(
        Allowed(
            SPILL,
            "A few bytes before or after the main loop, none in it: most often the assembler's price for one more "
            "block on a multiprocessor.",
            arch=arch,
            triton=triton,
            kernel=kernel,
            case=case,
        )
        for triton, arch, kernel, case in _SPILLS
    ),
)
