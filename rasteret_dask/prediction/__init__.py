# SPDX-License-Identifier: Apache-2.0
"""From a trained model to a map: outputs of chips, blended and written."""
