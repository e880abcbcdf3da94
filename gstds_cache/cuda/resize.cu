// Decoded images of any sizes to pixels of a model: resized with antialiasing, cropped, rounded; one launch for all.
//
// A block makes TILE rows of pixels in one channel of one image, a thread columns of them: it goes through the image's
// rows once, sums each along x, and adds it to TILE sums along y, with weight 0 to those that do not look at it. Weights,
// and the order in which they are summed, are those of torch's ``interpolate(antialias=True)`` on a GPU
// (aten/src/ATen/native/cuda/UpSample.cuh).
//
// REACH is 1 for ``bilinear`` and 2 for ``bicubic``.
#include "block.cuh"

#define TILE 16
typedef unsigned char Byte;
typedef long long Wide;

#ifdef EMULATE
#define PRODUCT(a, b) ((a) * (b))
#else
#define PRODUCT(a, b) __fmul_rn(a, b)  // rounded: no compiler may contract it with what is added to it
#endif

struct Picture {  // a row of the table, as embedding/device_resizing.py fills it
    Wide at;                      // first byte, from ``images``
    Wide channel, row, column;    // from one to the next, in bytes; an image that EXIF turns has them exchanged
    Wide height, width;           // upright
    Wide tall, broad;             // what it is resized to
    Wide top, left;               // first row and column of the pixels in that; below 0 they are filled up with black
    Wide place;                   // where it goes in ``pixels``
};

// Rows, or columns, that one pixel is a mean of. Each is computed once, and read from shared memory by all who need it:
// computed in two places it may be rounded in two ways, and be another one.
struct Span { int first, count; };

__device__ __forceinline__ float scale_of(Wide length, Wide size) { return (float)length / (float)size; }

__device__ __forceinline__ Span span_of(int i, Wide length, float scale) {
    float reach = scale >= 1 ? PRODUCT(REACH, scale) : REACH, center = PRODUCT(scale, i + 0.5f);
    int first = (int)(center - reach + 0.5f), end = (int)(center + reach + 0.5f);
    first = first > 0 ? first : 0;
    end = end < length ? end : (int)length;
    return {first, end - first};
}

__device__ __forceinline__ float filter(float x) {
    x = fabsf(x);
#if REACH == 1
    return x < 1 ? 1 - x : 0;
#else
    const float a = -0.5f;
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
#endif
}

// The weights of pixel i, ``step`` floats apart.
__device__ __forceinline__ void weigh(int i, Span span, float scale, int step, float *weight) {
    float center = PRODUCT(scale, i + 0.5f), narrow = scale >= 1 ? 1 / scale : 1, total = 0;
    for (int j = 0; j < span.count; j++) {
        float w = filter((j + (span.first - center) + 0.5f) * narrow);
        weight[j * step] = w;
        total += w;
    }
    for (int j = 0; j < span.count; j++) weight[j * step] /= total;
}

// pixels: [images][3][height][width]. taps: columns that a pixel of any of the images is a mean of, at most; lines: rows
// that TILE rows of pixels are means of, at most.
extern "C" __global__ void resize_block(int height, int width, int taps, int lines, const Byte *__restrict__ images,
                                        const Wide *__restrict__ table, Byte *__restrict__ pixels)
{
    SHARED_MEMORY(memory);
    float *along_y = (float *)memory;                     // [lines][TILE]
    float *along_x = along_y + lines * TILE;              // [taps][width]
    Span *columns = (Span *)(along_x + taps * width);     // [width], of nothing where the pixels are black
    Span *spans = columns + width;                        // [TILE], likewise
    int tiles = (height + TILE - 1) / TILE, channel = blockIdx.x / tiles % 3;
    Picture p = ((const Picture *)table)[blockIdx.x / tiles / 3];
    int begin = blockIdx.x % tiles * TILE, rows = height - begin < TILE ? height - begin : TILE;
    const Byte *image = (const Byte *)((Wide)images + p.at + channel * p.channel);
    float scale_x = scale_of(p.width, p.broad), scale_y = scale_of(p.height, p.tall);
    EACH(y, TILE) {
        Wide i = begin + y + p.top;
        spans[y] = y < rows && i >= 0 && i < p.tall ? span_of((int)i, p.height, scale_y) : Span{0, 0};
    }
    EACH(x, width) {
        Wide i = x + p.left;
        columns[x] = i >= 0 && i < p.broad ? span_of((int)i, p.width, scale_x) : Span{0, 0};
        weigh((int)i, columns[x], scale_x, width, along_x + x);
    }
    SYNC();
    int from = (int)p.height, to = 0;  // rows of the image that any of these pixels looks at
    for (int y = 0; y < TILE; y++) {
        if (!spans[y].count) continue;
        from = spans[y].first < from ? spans[y].first : from;
        to = spans[y].first + spans[y].count;
    }
    EACH(n, (to - from) * TILE) along_y[n] = 0;
    SYNC();
    EACH(y, TILE) {
        int i = (int)(begin + y + p.top);
        weigh(i, spans[y], scale_y, TILE, along_y + (spans[y].count ? spans[y].first - from : 0) * TILE + y);
    }
    SYNC();
    pixels += ((p.place * 3 + channel) * height + begin) * width;
    EACH(x, width) {
        float sum[TILE] = {};
        Span span = columns[x];
        for (int r = from; r < to && span.count; r++) {
            const Byte *line = image + r * p.row + span.first * p.column;
            float mean = 0;
            for (int j = 0; j < span.count; j++) mean += line[j * p.column] * along_x[j * width + x];
#pragma unroll
            for (int y = 0; y < TILE; y++) sum[y] += mean * along_y[(r - from) * TILE + y];
        }
#pragma unroll
        for (int y = 0; y < TILE; y++) {
            float value = rintf(sum[y]);
            if (y < rows) pixels[y * width + x] = (Byte)(value < 0 ? 0 : value > 255 ? 255 : value);
        }
    }
}

extern "C" __host__ __device__ int resize_bytes(int width, int taps, int lines)
{
    return 4 * (taps * width + lines * TILE) + 8 * (width + TILE);
}
