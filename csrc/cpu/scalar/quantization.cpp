#include "cpu/lanes.h"
