# SPDX-License-Identifier: Apache-2.0
"""What training loops of torch ask for beside batches."""
