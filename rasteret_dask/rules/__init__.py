# SPDX-License-Identifier: Apache-2.0
"""What a pixel means, as values with methods: kinds of band."""
