"""The device code of the engine `triton`: the equations of `tiled`, a tile of queries and keys at a time.

Logits are in units of log 2, so that softmax takes exp2. A matrix of any width is kept as its `FIRST` columns
and the `REST`, powers of two both: 96 as 64 and 32. Sums of products are `WIDE`: float32, or float64.

The bias b of a tile is either that of `PhysicsBias`, computed on the spot from what each token has, or a tile of
`block`: b of some rows and columns, `[B or 1, H, rows, columns]`. A kernel looks at these rows and columns alone;
several launches add up to attention over all of them.
"""

import triton
import triton.language as tl
from triton.runtime import JITFunction

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def before(indices, end, EVEN: tl.constexpr):
    """Which indices come before the end: all of them, as the compiler then knows, where tiles fill it evenly."""
    if EVEN:
        return tl.full(indices.shape, True, tl.int1)
    else:
        return indices < end


INTERPRETED = tl.constexpr(not isinstance(before, JITFunction))  # on the CPU, for tests


@triton.jit
def load_part(matrix, rows, stride, inside, START: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Some columns of some rows, zero beyond the matrix."""
    columns = START + tl.arange(0, SIZE)
    pointers = matrix + rows[:, None] * stride + columns[None, :]
    if START + SIZE <= WIDTH:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def load_rows(matrix, rows, stride, inside, WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    """Some rows: their first columns, and the rest."""
    first = load_part(matrix, rows, stride, inside, 0, FIRST, WIDTH)
    if REST > 0:
        return first, load_part(matrix, rows, stride, inside, FIRST, REST, WIDTH)
    else:
        return first, first


@triton.jit
def store_part(matrix, rows, stride, inside, values, START: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    columns = START + tl.arange(0, SIZE)
    pointers = matrix + rows[:, None] * stride + columns[None, :]
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointers, values.to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(matrix, rows, stride, inside, first, rest, WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    """What `load_rows` loads."""
    store_part(matrix, rows, stride, inside, first, 0, FIRST, WIDTH)
    if REST > 0:
        store_part(matrix, rows, stride, inside, rest, FIRST, REST, WIDTH)


@triton.jit
def add_product(total, a, b, WIDE: tl.constexpr):
    """total + a b"""
    if INTERPRETED:  # the interpreter multiplies bfloat16 as if it were integers
        a, b = a.to(WIDE), b.to(WIDE)
    return tl.dot(a, b, total, out_dtype=WIDE, input_precision="ieee")


@triton.jit
def products(a, a_rest, b, b_rest, REST: tl.constexpr, WIDE: tl.constexpr):
    """a b^T"""
    total = add_product(tl.zeros([a.shape[0], b.shape[0]], WIDE), a, tl.trans(b), WIDE)
    if REST > 0:
        total = add_product(total, a_rest, tl.trans(b_rest), WIDE)
    return total


@triton.jit
def add_products(total, total_rest, weights, b, b_rest, REST: tl.constexpr, WIDE: tl.constexpr):
    """total + weights b, with the weights rounded to b's type as the tensor cores want it."""
    weights = weights.to(b.dtype)
    total = add_product(total, weights, b, WIDE)
    if REST > 0:
        total_rest = add_product(total_rest, weights, b_rest, WIDE)
    return total, total_rest


@triton.jit
def load_tokens(values, tokens, inside, WIDE: tl.constexpr):
    """z / H of some tokens."""
    return tl.load(values + tokens, mask=inside, other=0.0).to(WIDE)


@triton.jit
def load_calm(excess, tokens, inside, WIDE: tl.constexpr):
    """exp(-e / 2) of some tokens, so that the sigmoid of two tokens' mean excess takes no exponential a pair."""
    return tl.exp2(load_tokens(excess, tokens, inside, WIDE) * (-0.5 * LOG2_E))


@triton.jit
def penalised(z_query, z_key, DIRECTION: tl.constexpr):
    """The part of the rise from query to key that costs attention."""
    if DIRECTION == "key_above":
        return tl.maximum(z_key - z_query, 0.0)
    elif DIRECTION == "query_above":
        return tl.maximum(z_query - z_key, 0.0)
    else:
        return tl.abs(z_key - z_query)


@triton.jit
def slope(z_query, z_key, DIRECTION: tl.constexpr, WIDE: tl.constexpr):
    """d penalised / d z_key, and -d penalised / d z_query."""
    above, below = (z_key > z_query).to(WIDE), (z_key < z_query).to(WIDE)
    if DIRECTION == "key_above":
        return above
    elif DIRECTION == "query_above":
        return -below
    else:
        return above - below


@triton.jit
def windy(calm_query, calm_key):
    """sigmoid((e_i + e_j) / 2)"""
    return 1.0 / (1.0 + calm_query * calm_key)


@triton.jit
def load_block(block, rows, columns, width, inside):
    """A tile of `block`, as the two pairs of indices are broadcast; zero beyond it."""
    return tl.load(block + rows * width + columns, mask=inside, other=0.0)


@triton.jit
def attention_forward(
    q, k, v, out, logsumexp,
    height, excess, alpha, beta,
    block, block_stride,
    sample_stride, head_stride, token_stride,
    tokens, first_row, end_row, first_column, end_column,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, SCALE: tl.constexpr,
    DIRECTION: tl.constexpr, RESUME: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = softmax(s q k^T + b) v and its logsumexp, over these columns; with RESUME over earlier ones as well."""
    WIDE: tl.constexpr = logsumexp.dtype.element_ty
    rows = first_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_inside = before(rows, end_row, EVEN)
    sample, head = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    origin = sample * sample_stride + head * head_stride
    out += (sample * tokens * HEADS + head) * WIDTH
    logsumexp += (sample * HEADS + head) * tokens
    query, query_rest = load_rows(q + origin, rows, token_stride, row_inside, WIDTH, FIRST, REST)
    if block is None:
        z_query = load_tokens(height + sample * tokens, rows, row_inside, WIDE)
        strength = tl.load(alpha).to(WIDE) * LOG2_E
        if excess is not None:
            calm_query = load_calm(excess + sample * tokens, rows, row_inside, WIDE)
            share = tl.load(beta).to(WIDE)
    else:
        width = end_column - first_column
        block += sample * block_stride + head * (end_row - first_row) * width

    if RESUME:
        peak = tl.load(logsumexp + rows, mask=row_inside, other=0.0)
        total = tl.full([ROWS], 1.0, WIDE)
        mean, mean_rest = load_rows(out, rows, HEADS * WIDTH, row_inside, WIDTH, FIRST, REST)
    else:
        peak = tl.full([ROWS], float("-inf"), WIDE)
        total = tl.zeros([ROWS], WIDE)
        mean, mean_rest = tl.zeros([ROWS, FIRST], WIDE), tl.zeros([ROWS, REST if REST > 0 else FIRST], WIDE)

    for start in range(first_column, end_column, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        column_inside = before(columns, end_column, EVEN)
        key, key_rest = load_rows(k + origin, columns, token_stride, column_inside, WIDTH, FIRST, REST)
        logits = products(query, query_rest, key, key_rest, REST, WIDE) * (SCALE * LOG2_E)
        if block is None:
            z_key = load_tokens(height + sample * tokens, columns, column_inside, WIDE)
            cost = strength * penalised(z_query[:, None], z_key[None, :], DIRECTION)
            if excess is not None:
                calm_key = load_calm(excess + sample * tokens, columns, column_inside, WIDE)
                cost *= 1.0 - share * windy(calm_query[:, None], calm_key[None, :])
            logits -= cost
        else:
            inside = row_inside[:, None] & column_inside[None, :]
            b = load_block(block, rows[:, None] - first_row, columns[None, :] - first_column, width, inside)
            logits += b * LOG2_E
        logits = tl.where(column_inside[None, :], logits, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(logits, 1))
        p = tl.exp2(logits - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        peak = new_peak
        total = total * shrink + tl.sum(p, 1)
        value, value_rest = load_rows(v + origin, columns, token_stride, column_inside, WIDTH, FIRST, REST)
        mean = mean * shrink[:, None]
        if REST > 0:
            mean_rest = mean_rest * shrink[:, None]
        mean, mean_rest = add_products(mean, mean_rest, p, value, value_rest, REST, WIDE)

    mean, mean_rest = mean / total[:, None], mean_rest / total[:, None]
    store_rows(out, rows, HEADS * WIDTH, row_inside, mean, mean_rest, WIDTH, FIRST, REST)
    tl.store(logsumexp + rows, peak + tl.log2(total), mask=row_inside)


@triton.jit
def row_products(
    grad, out, delta, tokens,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(do * out)"""
    WIDE: tl.constexpr = delta.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = before(rows, tokens, EVEN)
    sample, head = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    origin = (sample * tokens * HEADS + head) * WIDTH
    g, g_rest = load_rows(grad + origin, rows, HEADS * WIDTH, inside, WIDTH, FIRST, REST)
    o, o_rest = load_rows(out + origin, rows, HEADS * WIDTH, inside, WIDTH, FIRST, REST)
    total = tl.sum(g.to(WIDE) * o.to(WIDE), 1)
    if REST > 0:
        total += tl.sum(g_rest.to(WIDE) * o_rest.to(WIDE), 1)
    tl.store(delta + (sample * HEADS + head) * tokens + rows, total, mask=inside)


@triton.jit
def attention_backward_queries(
    q, k, v, grad, logsumexp, delta, dq,
    height, excess, alpha, beta, dalpha, dbeta, dheight, dexcess,
    sample_stride, head_stride, token_stride, tokens,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, SCALE: tl.constexpr,
    DIRECTION: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dq of a tile of rows, and what these rows add to the gradients of the physics bias."""
    WIDE: tl.constexpr = logsumexp.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_inside = before(rows, tokens, EVEN)
    sample, head = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    origin = sample * sample_stride + head * head_stride
    of_head = (sample * tokens * HEADS + head) * WIDTH
    of_row = (sample * HEADS + head) * tokens + rows
    query, query_rest = load_rows(q + origin, rows, token_stride, row_inside, WIDTH, FIRST, REST)
    g, g_rest = load_rows(grad + of_head, rows, HEADS * WIDTH, row_inside, WIDTH, FIRST, REST)
    lse = tl.load(logsumexp + of_row, mask=row_inside, other=float("inf"))
    row_delta = tl.load(delta + of_row, mask=row_inside, other=0.0)
    z_query = load_tokens(height + sample * tokens, rows, row_inside, WIDE)
    strength = tl.load(alpha).to(WIDE)
    if excess is not None:
        calm_query = load_calm(excess + sample * tokens, rows, row_inside, WIDE)
        share = tl.load(beta).to(WIDE)

    of_query, of_query_rest = tl.zeros([ROWS, FIRST], WIDE), tl.zeros([ROWS, REST if REST > 0 else FIRST], WIDE)
    of_alpha, of_beta = tl.zeros([ROWS], WIDE), tl.zeros([ROWS], WIDE)
    of_height, of_excess = tl.zeros([ROWS], WIDE), tl.zeros([ROWS], WIDE)
    for start in range(0, tokens, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        column_inside = before(columns, tokens, EVEN)
        key, key_rest = load_rows(k + origin, columns, token_stride, column_inside, WIDTH, FIRST, REST)
        value, value_rest = load_rows(v + origin, columns, token_stride, column_inside, WIDTH, FIRST, REST)
        z_key = load_tokens(height + sample * tokens, columns, column_inside, WIDE)
        penalty = penalised(z_query[:, None], z_key[None, :], DIRECTION)
        damped = penalty
        if excess is not None:
            calm_key = load_calm(excess + sample * tokens, columns, column_inside, WIDE)
            wind = windy(calm_query[:, None], calm_key[None, :])
            damped = penalty * (1.0 - share * wind)
        logits = products(query, query_rest, key, key_rest, REST, WIDE) * (SCALE * LOG2_E)
        logits -= (strength * LOG2_E) * damped
        logits = tl.where(column_inside[None, :], logits, float("-inf"))
        p = tl.exp2(logits - lse[:, None])
        ds = p * (products(g, g_rest, value, value_rest, REST, WIDE) - row_delta[:, None])
        of_query, of_query_rest = add_products(of_query, of_query_rest, ds, key, key_rest, REST, WIDE)

        of_alpha -= tl.sum(ds * damped, 1)
        if excess is not None:
            of_beta += tl.sum(ds * penalty * wind, 1)
        if dheight is not None:
            steep = slope(z_query[:, None], z_key[None, :], DIRECTION, WIDE)
            if excess is not None:
                steep *= 1.0 - share * wind
                of_excess += tl.sum(ds * penalty * (wind - wind * wind), 1)
            of_height += tl.sum(ds * steep, 1)

    store_rows(
        dq + of_head, rows, HEADS * WIDTH, row_inside, of_query * SCALE, of_query_rest * SCALE, WIDTH, FIRST, REST
    )
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(dalpha + program, tl.sum(of_alpha, 0))
    if excess is not None:
        tl.store(dbeta + program, strength * tl.sum(of_beta, 0))
    if dheight is not None:
        tl.store(dheight + of_row, strength * of_height, mask=row_inside)
        if excess is not None:
            tl.store(dexcess + of_row, (0.5 * strength * share) * of_excess, mask=row_inside)


@triton.jit
def attention_backward_keys(
    q, k, v, grad, logsumexp, delta, dk, dv,
    height, excess, alpha, beta, dheight, dexcess,
    block, dblock, block_stride,
    sample_stride, head_stride, token_stride,
    tokens, first_row, end_row, first_column, end_column,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, SCALE: tl.constexpr,
    DIRECTION: tl.constexpr, RESUME: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of columns, from these rows, with RESUME added to what is there; and db of the block.

    Tiles stand on their side here, keys down and queries across, so that no probabilities are transposed.
    """
    WIDE: tl.constexpr = logsumexp.dtype.element_ty
    columns = first_column + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_inside = before(columns, end_column, EVEN)
    sample, head = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    origin = sample * sample_stride + head * head_stride
    of_head = (sample * tokens * HEADS + head) * WIDTH
    of_row = (sample * HEADS + head) * tokens
    key, key_rest = load_rows(k + origin, columns, token_stride, column_inside, WIDTH, FIRST, REST)
    value, value_rest = load_rows(v + origin, columns, token_stride, column_inside, WIDTH, FIRST, REST)
    if block is None:
        z_key = load_tokens(height + sample * tokens, columns, column_inside, WIDE)
        strength = tl.load(alpha).to(WIDE)
        if excess is not None:
            calm_key = load_calm(excess + sample * tokens, columns, column_inside, WIDE)
            share = tl.load(beta).to(WIDE)
    else:
        width, size = end_column - first_column, (end_row - first_row) * (end_column - first_column)
        block += sample * block_stride + head * size
        dblock += (sample * HEADS + head) * size

    of_key, of_key_rest = tl.zeros([COLUMNS, FIRST], WIDE), tl.zeros([COLUMNS, REST if REST > 0 else FIRST], WIDE)
    of_value, of_value_rest = tl.zeros([COLUMNS, FIRST], WIDE), tl.zeros([COLUMNS, REST if REST > 0 else FIRST], WIDE)
    of_height, of_excess = tl.zeros([COLUMNS], WIDE), tl.zeros([COLUMNS], WIDE)
    for start in range(first_row, end_row, ROWS):
        rows = start + tl.arange(0, ROWS)
        row_inside = before(rows, end_row, EVEN)
        query, query_rest = load_rows(q + origin, rows, token_stride, row_inside, WIDTH, FIRST, REST)
        g, g_rest = load_rows(grad + of_head, rows, HEADS * WIDTH, row_inside, WIDTH, FIRST, REST)
        lse = tl.load(logsumexp + of_row + rows, mask=row_inside, other=float("inf"))
        row_delta = tl.load(delta + of_row + rows, mask=row_inside, other=0.0)
        logits = products(key, key_rest, query, query_rest, REST, WIDE) * (SCALE * LOG2_E)
        if block is None:
            z_query = load_tokens(height + sample * tokens, rows, row_inside, WIDE)
            penalty = penalised(z_query[None, :], z_key[:, None], DIRECTION)
            damped = penalty
            if excess is not None:
                calm_query = load_calm(excess + sample * tokens, rows, row_inside, WIDE)
                wind = windy(calm_query[None, :], calm_key[:, None])
                damped = penalty * (1.0 - share * wind)
            logits -= (strength * LOG2_E) * damped
        else:
            inside = column_inside[:, None] & row_inside[None, :]
            b = load_block(block, rows[None, :] - first_row, columns[:, None] - first_column, width, inside)
            logits += b * LOG2_E
        p = tl.exp2(logits - lse[None, :])
        of_value, of_value_rest = add_products(of_value, of_value_rest, p, g, g_rest, REST, WIDE)
        ds = p * (products(value, value_rest, g, g_rest, REST, WIDE) - row_delta[None, :])
        of_key, of_key_rest = add_products(of_key, of_key_rest, ds, query, query_rest, REST, WIDE)

        if block is not None:
            pointers = dblock + (rows[None, :] - first_row) * width + columns[:, None] - first_column
            tl.store(pointers, ds.to(dblock.dtype.element_ty), mask=inside)
        if dheight is not None:
            steep = slope(z_query[None, :], z_key[:, None], DIRECTION, WIDE)
            if excess is not None:
                steep *= 1.0 - share * wind
                of_excess += tl.sum(ds * penalty * (wind - wind * wind), 1)
            of_height -= tl.sum(ds * steep, 1)

    of_key, of_key_rest = of_key * SCALE, of_key_rest * SCALE
    if RESUME:
        old, old_rest = load_rows(dk + of_head, columns, HEADS * WIDTH, column_inside, WIDTH, FIRST, REST)
        of_key, of_key_rest = of_key + old, of_key_rest + old_rest
        old, old_rest = load_rows(dv + of_head, columns, HEADS * WIDTH, column_inside, WIDTH, FIRST, REST)
        of_value, of_value_rest = of_value + old, of_value_rest + old_rest
    store_rows(dk + of_head, columns, HEADS * WIDTH, column_inside, of_key, of_key_rest, WIDTH, FIRST, REST)
    store_rows(dv + of_head, columns, HEADS * WIDTH, column_inside, of_value, of_value_rest, WIDTH, FIRST, REST)
    if dheight is not None:
        tl.store(dheight + of_row + columns, strength * of_height, mask=column_inside)
        if excess is not None:
            tl.store(dexcess + of_row + columns, (0.5 * strength * share) * of_excess, mask=column_inside)


@triton.jit
def load_units(values, tokens, inside, UNITS: tl.constexpr, UNITS_HELD: tl.constexpr):
    """What some tokens add to each hidden unit, `[tokens, units]`, zero beyond."""
    units = tl.arange(0, UNITS_HELD)
    mask = inside[:, None] & (units < UNITS)[None, :]
    return tl.load(values + tokens[:, None] * UNITS + units[None, :], mask=mask, other=0.0)


@triton.jit
def load_weight(weight, HEADS: tl.constexpr, HEADS_HELD: tl.constexpr, UNITS: tl.constexpr, UNITS_HELD: tl.constexpr):
    """W2, `[heads, units]`, zero beyond."""
    heads, units = tl.arange(0, HEADS_HELD), tl.arange(0, UNITS_HELD)
    mask = (heads < HEADS)[:, None] & (units < UNITS)[None, :]
    return tl.load(weight + heads[:, None] * UNITS + units[None, :], mask=mask, other=0.0)


@triton.jit
def relative_bias(
    of_query, of_key, weight, constant, block,
    tokens, first_row, end_row, first_column, end_column,
    HEADS: tl.constexpr, HEADS_HELD: tl.constexpr, UNITS: tl.constexpr, UNITS_HELD: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """b[h, i, j] = W2[h] . relu(a_i + c_j) + b2[h] of the block, for all heads at once."""
    WIDE: tl.constexpr = block.dtype.element_ty
    columns = first_column + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_inside = before(columns, end_column, EVEN)
    start = first_row + tl.program_id(1) * ROWS
    sample = tl.program_id(2).to(tl.int64)
    units, heads = tl.arange(0, UNITS_HELD), tl.arange(0, HEADS_HELD)
    of_query += sample * tokens * UNITS
    width, size = end_column - first_column, (end_row - first_row) * (end_column - first_column)
    key = load_units(of_key + sample * tokens * UNITS, columns, column_inside, UNITS, UNITS_HELD)
    last = tl.trans(load_weight(weight, HEADS, HEADS_HELD, UNITS, UNITS_HELD))
    shift = tl.load(constant + heads, mask=heads < HEADS, other=0.0)
    inside = column_inside[:, None] & (heads < HEADS)[None, :]
    to = block + (sample * HEADS + heads[None, :]) * size + columns[:, None] - first_column
    for row in range(start, min(start + ROWS, end_row)):
        query = tl.load(of_query + row * UNITS + units, mask=units < UNITS, other=0.0)
        hidden = tl.maximum(query[None, :] + key, 0.0)
        b = tl.dot(hidden, last, out_dtype=WIDE, input_precision=PRECISION) + shift[None, :]
        tl.store(to + (row - first_row) * width, b, mask=inside)


@triton.jit
def relative_bias_backward(
    of_query, of_key, weight, dblock, dquery, dkey, dweight, dconstant,
    tokens, first_row, end_row, first_column, end_column,
    HEADS: tl.constexpr, HEADS_HELD: tl.constexpr, UNITS: tl.constexpr, UNITS_HELD: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What a tile of the block adds to the gradients of a, c, W2 and b2, each program to a place of its own."""
    WIDE: tl.constexpr = dquery.dtype.element_ty
    columns = first_column + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_inside = before(columns, end_column, EVEN)
    start = first_row + tl.program_id(1) * ROWS
    sample = tl.program_id(2).to(tl.int64)
    units, heads = tl.arange(0, UNITS_HELD), tl.arange(0, HEADS_HELD)
    of_query += sample * tokens * UNITS
    width, height = end_column - first_column, end_row - first_row
    key = load_units(of_key + sample * tokens * UNITS, columns, column_inside, UNITS, UNITS_HELD)
    last = load_weight(weight, HEADS, HEADS_HELD, UNITS, UNITS_HELD)
    inside = column_inside[:, None] & (heads < HEADS)[None, :]
    source = dblock + (sample * HEADS + heads[None, :]) * height * width + columns[:, None] - first_column
    dquery += (sample * tl.num_programs(0) + tl.program_id(0)) * height * UNITS

    of_keys = tl.zeros([COLUMNS, UNITS_HELD], WIDE)
    of_weight = tl.zeros([HEADS_HELD, UNITS_HELD], WIDE)
    of_constant = tl.zeros([HEADS_HELD], WIDE)
    for row in range(start, min(start + ROWS, end_row)):
        ds = tl.load(source + (row - first_row) * width, mask=inside, other=0.0).to(WIDE)
        query = tl.load(of_query + row * UNITS + units, mask=units < UNITS, other=0.0)
        hidden = tl.maximum(query[None, :] + key, 0.0)
        dhidden = tl.dot(ds, last, out_dtype=WIDE, input_precision=PRECISION)
        dhidden = tl.where(hidden > 0, dhidden, 0.0)
        of_keys += dhidden
        tl.store(dquery + (row - first_row) * UNITS + units, tl.sum(dhidden, 0), mask=units < UNITS)
        of_weight = tl.dot(tl.trans(ds), hidden, of_weight, out_dtype=WIDE, input_precision=PRECISION)
        of_constant += tl.sum(ds, 0)

    strip = sample * tl.num_programs(1) + tl.program_id(1)
    key_mask = column_inside[:, None] & (units < UNITS)[None, :]
    to = dkey + (strip * width + columns[:, None] - first_column) * UNITS + units[None, :]
    tl.store(to, of_keys, mask=key_mask)
    program = strip * tl.num_programs(0) + tl.program_id(0)
    weight_mask = (heads < HEADS)[:, None] & (units < UNITS)[None, :]
    tl.store(dweight + (program * HEADS + heads[:, None]) * UNITS + units[None, :], of_weight, mask=weight_mask)
    tl.store(dconstant + program * HEADS + heads, of_constant, mask=heads < HEADS)
