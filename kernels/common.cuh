#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <stdint.h>
